"""Full weights as a Hugging Face directory: bfloat16 safetensors under the names of the family's own files, config and tokenizer."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from gradstream.engine.checkpoint.manifest import MANIFEST_FILE
from gradstream.engine.checkpoint.peft_format import write_tensors

SHARD_BYTES = 5_000_000_000
DTYPE = torch.bfloat16
# Everything beside weights and model config: the tokenizer in its several forms, and the chat template.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_WRITTEN = ("config.json", MANIFEST_FILE)
_INDEX = "model.safetensors.index.json"
_BYTES_PER_TENSOR = 320
_FIXED_BYTES = 64 * 1024
# What stands between the parameters of a layer and those of the model.
_LAYERS = "model.layers."

# A parameter's values by its name in the model in memory.
Values = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where what is not weights comes from: the model's config, and the directory of its tokenizer."""

    config_dir: Path
    tokenizer_dir: Path


def huggingface_size_bytes(shapes: Mapping[str, tuple[int, ...]], family: Family) -> int:
    """An upper bound, close to exact, of what `write_huggingface` writes."""
    plan = _plan(_skeleton(family), shapes, shard_bytes=SHARD_BYTES)
    num_tensors = sum(len(shard.names) for shard in plan)
    # The index names each tensor again.
    overhead = 2 * num_tensors * _BYTES_PER_TENSOR + _FIXED_BYTES
    return sum(shard.size_bytes for shard in plan) + overhead + sum(path.stat().st_size for path in _copied(family))


def write_huggingface(
    draft: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Values,
    family: Family,
    *,
    shard_bytes: int,
) -> None:
    """Fill draft with a model that transformers opens.

    shapes: of every parameter, by its name in the model in memory; tied ones once. values are rounded to bfloat16, and only one shard's
    worth of them, and a layer's, is in memory at a time. Raises OSError.
    """
    model = _skeleton(family)
    shards = _plan(model, shapes, shard_bytes=shard_bytes)
    pending: dict[str, Tensor] = {}
    layers = _converted(model, shapes, lambda name: values(name).detach().to("cpu", DTYPE))
    for shard in shards:
        while not pending.keys() >= shard.names:
            pending |= next(layers)
        # Parts of one tensor share its memory, which safetensors refuses.
        tensors = {name: pending.pop(name).clone(memory_format=torch.contiguous_format) for name in sorted(shard.names)}
        write_tensors(draft / shard.file, tensors, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_index(draft, shards)
    model.config.dtype = DTYPE
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(draft)
    for path in _copied(family):
        shutil.copyfile(path, draft / path.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """One file and the tensors in it, by their names there."""

    file: str
    names: frozenset[str]
    size_bytes: int


def _plan(model: Any, shapes: Mapping[str, tuple[int, ...]], *, shard_bytes: int) -> list[_Shard]:  # noqa: ANN401 (see _skeleton)
    """Which tensor goes into which file, in the order in which they are made; a file has at most shard_bytes, or one tensor."""
    files: list[dict[str, int]] = [{}]
    for layer in _converted(model, shapes, lambda name: torch.empty(shapes[name], dtype=DTYPE, device="meta")):
        for name, tensor in layer.items():
            if files[-1] and sum(files[-1].values()) + tensor.nbytes > shard_bytes:
                files.append({})
            files[-1][name] = tensor.nbytes
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    return [
        _Shard(file=name, names=frozenset(sizes), size_bytes=sum(sizes.values()))
        for name, sizes in zip(names if len(files) > 1 else ["model.safetensors"], files, strict=True)
    ]


def _converted(model: Any, names: Iterable[str], values: Values) -> Iterator[dict[str, Tensor]]:  # noqa: ANN401 (see _skeleton)
    """A layer's tensors after another's, under the names of the family's files: fused experts are one tensor each there."""
    for _, group in groupby(sorted(names, key=_layer), key=_layer):
        yield revert_weight_conversion(model, {name: values(name) for name in group})


def _layer(name: str) -> int:
    """The number of the layer that a parameter belongs to; -1 for the model's own."""
    return int(name.removeprefix(_LAYERS).partition(".")[0]) if name.startswith(_LAYERS) else -1


def _skeleton(family: Family) -> Any:  # noqa: ANN401 (each family of transformers has its own class)
    """The model without any weight."""
    config = AutoConfig.from_pretrained(family.config_dir, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _write_index(draft: Path, shards: Iterable[_Shard]) -> None:
    places = {name: shard.file for shard in shards for name in shard.names}
    total = sum(shard.size_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (draft / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copied(family: Family) -> list[Path]:
    """The tokenizer's files, and the model's generation_config.json."""
    found = {path.name: path for pattern in COPIED for path in family.tokenizer_dir.glob(pattern)}
    generation = family.config_dir / "generation_config.json"
    if generation.is_file():
        found[generation.name] = generation
    return [path for name, path in sorted(found.items()) if name not in _WRITTEN and not name.endswith(".index.json")]
