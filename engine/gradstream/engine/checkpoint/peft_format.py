"""An adapter as the two files that peft opens: adapter_config.json and adapter_model.safetensors.

peft scales by lora_alpha / r as we do. The expert weights of a layer are one module with two parameters there; peft wraps it once
for each parameter, so the first one's names carry `base_layer`. It stacks the experts' A along rows, and interleaves the experts of
B along columns, the expert index fastest.
"""

# Shape letters: E experts, R rank, I in features, O out features.

import json
import os
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradstream.engine.adapters.layout import AdapterLayout, LoraPair, Site, SiteKind
from gradstream.shared.errors import InvalidRequest, StorageFailure

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_peft(directory: Path, layout: AdapterLayout, weights: Tensor, *, scale: float, base_model: str) -> None:
    """Write both files for flat weights (float32 [num_params]) into directory."""
    tensors: dict[str, Tensor] = {}
    pairs = layout.named_views(weights.detach().cpu())
    for site, stem in _stems(layout):
        a_name, b_name = _names(stem)
        tensors[a_name], tensors[b_name] = _to_peft(site, pairs[site.name])
    write_tensors(directory / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
    config = _config(layout, scale=scale, base_model=base_model)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_peft(directory: Path, layout: AdapterLayout, *, source: str) -> Tensor:
    """Flat float32 weights in layout, on the CPU.

    source is the checkpoint's URI for messages. Raises InvalidRequest when its tensors are not those of the layout,
    StorageFailure when the file cannot be read.
    """
    tensors = read_tensors(directory / WEIGHTS_FILE, source=source)
    stems = _stems(layout)
    expected = {name for _, stem in stems for name in _names(stem)}
    for name in sorted(expected ^ set(tensors)):
        what = "lacks" if name in expected else "holds"
        raise InvalidRequest(f"checkpoint {source} {what} {name!r}, so it is not of the layers that this model trains")
    flat = torch.empty(layout.num_params, dtype=torch.float32)
    views = layout.named_views(flat)
    for site, stem in stems:
        a_name, b_name = _names(stem)
        for name, shape in zip((a_name, b_name), _peft_shapes(site, layout.rank), strict=True):
            if tuple(tensors[name].shape) != shape:
                raise InvalidRequest(
                    f"checkpoint {source}: {name!r} has shape {list(tensors[name].shape)}; this model needs {list(shape)}"
                )
        a, b = _from_peft(site, tensors[a_name], tensors[b_name])
        views[site.name].a.copy_(a)
        views[site.name].b.copy_(b)
    return flat


def write_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str]) -> None:
    """Write a safetensors file; raises OSError, with the system's number, when the file system refuses."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # The library tells what the system said as text only.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def read_tensors(path: Path, *, source: str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; raises StorageFailure when it cannot be read."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageFailure(f"checkpoint {source} is damaged: {path.name} cannot be read ({error})") from error
    return tensors


def _stems(layout: AdapterLayout) -> list[tuple[Site, str]]:
    """Each site with what stands before `.lora_A.weight` in peft's names for it."""
    wrapped = Counter(_module(site) for site in layout.sites)
    stems = []
    for site in layout.sites:
        module = _module(site)
        # Wrappers still to come around this one; the last parameter's is the outermost.
        wrapped[module] -= 1
        stems.append((site, _PREFIX + module + ".base_layer" * wrapped[module]))
    return stems


def _module(site: Site) -> str:
    """The module that peft wraps: for experts the one that holds the parameter."""
    return site.name.rpartition(".")[0] if site.kind is SiteKind.EXPERTS else site.name


def _names(stem: str) -> tuple[str, str]:
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _peft_shapes(site: Site, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    stacked = rank * max(site.num_experts, 1)
    return (stacked, site.in_features), (site.out_features, stacked)


def _to_peft(site: Site, pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Copies in peft's shapes: safetensors refuses tensors that share memory, and ours are views into one."""
    if site.kind is SiteKind.EXPERTS:
        # a [E, R, I] -> [E * R, I]; b [E, O, R] -> [O, R * E].
        return pair.a.flatten(0, 1).clone(), pair.b.permute(1, 2, 0).flatten(1, 2).contiguous()
    return pair.a.clone(), pair.b.clone()


def _from_peft(site: Site, a: Tensor, b: Tensor) -> LoraPair:
    """The inverse of `_to_peft`."""
    if site.kind is SiteKind.EXPERTS:
        num_experts = site.num_experts
        return LoraPair(a.view(num_experts, -1, a.shape[1]), b.view(b.shape[0], -1, num_experts).permute(2, 0, 1))
    return LoraPair(a, b)


def _config(layout: AdapterLayout, *, scale: float, base_model: str) -> dict[str, object]:
    modules = {site.name.rpartition(".")[2] for site in layout.sites if site.kind is not SiteKind.EXPERTS}
    # The last two parts: `experts.down_proj`.
    parameters = {".".join(site.name.split(".")[-2:]) for site in layout.sites if site.kind is SiteKind.EXPERTS}
    lora_alpha = scale * layout.rank
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": layout.rank,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
