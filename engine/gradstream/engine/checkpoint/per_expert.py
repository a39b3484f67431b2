"""An adapter with one pair of factors for each expert's projections, as inference servers read mixture-of-experts adapters.

peft keeps the experts of a layer as one module with two fused parameters; servers name `experts.N.gate_proj`, `.up_proj` and
`.down_proj`. Gate and up are the two halves of the fused b and share its a, so the conversion is exact. An adapter without experts
has the same names in both formats.

Legend: E experts, R rank, I in features, O out features.
"""

import json
import shutil
from pathlib import Path

from torch import Tensor

from gradstream.engine.checkpoint.manifest import read_manifest, verify
from gradstream.engine.checkpoint.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_tensors, write_tensors
from gradstream.engine.files import whole_directory
from gradstream.shared.errors import StorageFailure

# What stands before `.lora_A.weight`: the inner of peft's two wrappers holds the fused gate and up, the outer one down.
_DOWN = ".experts"
_GATE_UP = ".experts.base_layer"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def export_per_expert(checkpoint_dir: Path, out: Path) -> Path:
    """Write the adapter of a checkpoint to out, with per-expert names; out.

    Raises UnknownModel (no checkpoint), InvalidRequest (full weights), StorageFailure (damaged, or out exists, or the disk refuses).
    """
    source = str(checkpoint_dir)
    manifest = read_manifest(checkpoint_dir, source=source)
    rank = manifest.stored_rank
    verify(checkpoint_dir, manifest, source=source)
    tensors = per_expert(read_tensors(checkpoint_dir / WEIGHTS_FILE, source=source), rank=rank)
    try:
        with whole_directory(out) as draft:
            write_tensors(draft / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
            shutil.copyfile(checkpoint_dir / CONFIG_FILE, draft / CONFIG_FILE)
            _retarget(draft / CONFIG_FILE)
    except FileExistsError as error:
        raise StorageFailure(f"{out} exists already; name a directory that does not") from error
    return out


def per_expert(tensors: dict[str, Tensor], *, rank: int) -> dict[str, Tensor]:
    """The tensors of a peft adapter with those of fused experts taken apart; the others are passed on."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        if not stem.endswith((_DOWN, _GATE_UP)):
            result[name] = tensor
        elif part == "lora_A":
            result |= _split(stem, tensor, tensors[f"{stem}.lora_B.weight"], rank=rank)
    return result


def _split(stem: str, a: Tensor, b: Tensor, *, rank: int) -> dict[str, Tensor]:
    """peft's a [E * R, I] and b [O, R * E] as one pair of tensors for each projection of each expert."""
    num_experts = a.shape[0] // rank
    a_ERI = a.view(num_experts, rank, a.shape[1])
    b_EOR = b.view(b.shape[0], rank, num_experts).permute(2, 0, 1)
    experts = stem.removesuffix(".base_layer")
    names = _PROJECTIONS[:2] if stem.endswith(_GATE_UP) else _PROJECTIONS[2:]
    return {
        f"{experts}.{number}.{name}.{part}.weight": tensor.clone()
        for number in range(num_experts)
        for name, half in zip(names, b_EOR[number].chunk(len(names)), strict=True)
        for part, tensor in (("lora_A", a_ERI[number]), ("lora_B", half.contiguous()))
    }


def _retarget(path: Path) -> None:
    """Name the projections as target modules in the place of the fused parameters."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("target_parameters", None):
        config["target_modules"] = sorted({*config["target_modules"], *_PROJECTIONS})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
