"""What was trained as a Hugging Face directory of its own: a base model with an adapter merged into it, or full weights."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gradstream.engine.adapters.layout import LoraPair, Site, SiteKind, layout_for
from gradstream.engine.adapters.modules import PassSlot
from gradstream.engine.checkpoint.full_export import write_exported
from gradstream.engine.checkpoint.huggingface import Family
from gradstream.engine.checkpoint.manifest import Manifest, read_manifest, verify
from gradstream.engine.checkpoint.peft_format import read_peft
from gradstream.engine.files import whole_directory
from gradstream.engine.models.build import Build, load_causal_lm
from gradstream.engine.models.sites import adapt
from gradstream.shared.errors import StorageFailure

SHARD_SIZE = "4GB"
# Everything beside weights and model config: the tokenizer in its several forms, and the chat template.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_WRITTEN = ("config.json", "generation_config.json")
_FLOAT32_BYTES = 4

# Told before each part of the work how many parts are done, and how many there are.
Progress = Callable[[int, int], None]


def merged_size_bytes(base_dir: Path, *, family: Family | None = None) -> int:
    """An upper bound, close to exact, of what a merged model takes on disk, from the base model's files and config alone.

    family: see `merge_checkpoint`.
    """
    family = family or Family(config_dir=base_dir, tokenizer_dir=base_dir)
    copied = {path for pattern in _COPIED for path in (*base_dir.glob(pattern), *family.tokenizer_dir.glob(pattern))}
    size = sum(path.stat().st_size for path in {*copied, *base_dir.glob("*.safetensors")})
    config = AutoConfig.from_pretrained(family.config_dir, local_files_only=True)
    if config.tie_word_embeddings:
        # The adapter may change the head, which then is a weight of its own.
        size += config.vocab_size * config.hidden_size * (config.dtype.itemsize if config.dtype else _FLOAT32_BYTES)
    return size


def merge_checkpoint(
    checkpoint_dir: Path,
    base_dir: Path,
    out: Path,
    *,
    family: Family | None = None,
    shard_size: str = SHARD_SIZE,
    progress: Progress = lambda _done, _total: None,
) -> Path:
    """Write base + scale * b @ a for every weight that the adapter changes to out; out. Of full weights, see `write_exported`.

    The sums are made in float32 and stored in the base model's dtype, in safetensors shards, beside config and tokenizer. A head
    that is tied to the embedding is untied when the adapter changes it, which the written config says. The base model is held in
    memory once. family: where config and tokenizer are, None for base_dir. Raises UnknownModel (no checkpoint), InvalidRequest (of another
    model), StorageFailure (damaged, or out exists, or the disk refuses), Unsupported (the base model cannot be read), and whatever progress
    raises; out is whole or not there.
    """
    family = family or Family(config_dir=base_dir, tokenizer_dir=base_dir)
    source = str(checkpoint_dir)
    manifest = read_manifest(checkpoint_dir, source=source)
    verify(checkpoint_dir, manifest, source=source)
    if manifest.full is not None:
        progress(1, 2)
        with _new_directory(out) as draft:
            write_exported(draft, checkpoint_dir, family, manifest)
        return out
    pairs = _pairs(checkpoint_dir, family.config_dir, manifest)
    # Any: each family of transformers has its own model class.
    model: Any = load_causal_lm(
        base_dir, dtype="auto", build=Build(config_path=None if family.config_dir == base_dir else family.config_dir)
    ).requires_grad_(False)
    # Reading, each site, writing.
    num_parts = len(pairs) + 2
    for number, (site, pair) in enumerate(pairs, start=1):
        progress(number, num_parts)
        _merge(model, site, pair, scale=manifest.scale)
    progress(num_parts - 1, num_parts)
    with _new_directory(out) as draft:
        model.save_pretrained(draft, max_shard_size=shard_size)
        _copy_tokenizer(family.tokenizer_dir, draft)
    return out


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    try:
        with whole_directory(out) as draft:
            yield draft
    except FileExistsError as error:
        raise StorageFailure(f"{out} exists already; name a directory that does not") from error


def _pairs(checkpoint_dir: Path, config_dir: Path, manifest: Manifest) -> list[tuple[Site, LoraPair]]:
    """Every site of the adapter with its factors in float32."""
    layout = layout_for(base_sites(config_dir), manifest.adapter).of_rank(manifest.stored_rank)
    flat = read_peft(checkpoint_dir, layout, source=str(checkpoint_dir))
    views = layout.named_views(flat)
    return [(site, views[site.name]) for site in layout.sites]


def base_sites(base_dir: Path) -> list[Site]:
    """The sites of a model, from its config alone: no weight is read."""
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return adapt(model, PassSlot())


def _merge(model: nn.Module, site: Site, pair: LoraPair, *, scale: float) -> None:
    if site.kind is SiteKind.EXPERTS:
        weight_EOI = model.get_parameter(site.name)
        # One expert at a time: a float32 copy of all of them could be as large as the model.
        for weight, a, b in zip(weight_EOI, pair.a, pair.b, strict=True):
            weight.copy_(_sum(weight, a, b, scale=scale))
        return
    if site.kind is SiteKind.HEAD:
        _untie(model)
    weight = model.get_parameter(f"{site.name}.weight")
    weight.copy_(_sum(weight, pair.a, pair.b, scale=scale))


def _sum(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """float32 weight [O, I] + scale * b [O, R] @ a [R, I]; copying it into the weight rounds once."""
    return torch.addmm(weight.float(), b, a, alpha=scale)


def _untie(model: nn.Module) -> None:
    """Give the head a weight of its own when it shares the embedding's."""
    weight = model.get_parameter("lm_head.weight")
    if weight is model.get_parameter("model.embed_tokens.weight"):
        model.get_submodule("lm_head").weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        config: Any = model.config  # each family has its own config class
        config.tie_word_embeddings = False


def _copy_tokenizer(tokenizer_dir: Path, draft: Path) -> None:
    names = {path.name for pattern in _COPIED for path in tokenizer_dir.glob(pattern)}
    for name in sorted(names):
        if name not in _WRITTEN and not name.endswith(".index.json"):
            shutil.copyfile(tokenizer_dir / name, draft / name)
