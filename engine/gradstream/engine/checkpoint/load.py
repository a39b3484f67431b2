"""Reads an adapter back, after every file has been found as it was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradstream.engine.adapters.layout import AdapterLayout, Site, layout_for
from gradstream.engine.checkpoint.location import Location
from gradstream.engine.checkpoint.manifest import Manifest, read_manifest, verify
from gradstream.engine.checkpoint.peft_format import read_peft, read_tensors
from gradstream.engine.checkpoint.save import OPTIMIZER_FILE
from gradstream.engine.checkpoint.snapshot import AdapterContent, to_bytes
from gradstream.shared.errors import InvalidRequest, UnknownModel
from gradstream.shared.ids import TenantId
from gradstream.shared.wire import LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """Which checkpoint for whom. base_models: every name of the base model that runs here, the main one first.

    expected is the spec that the checkpoint must have, None for any.
    """

    location: Location
    tenant: TenantId
    base_models: Sequence[str]
    base_sites: Sequence[Site]
    max_lora_rank: int
    with_optimizer: bool = False
    expected: LoraSpec | None = None


def load_content(order: LoadOrder, output_dir: Path) -> AdapterContent:
    """The checkpoint's contents; runs on one rank only.

    Raises UnknownModel when there is none (or it is another tenant's), InvalidRequest when it does not fit this engine or this
    model or has no optimizer although one is asked for, StorageFailure when it is damaged or cannot be read.
    """
    source = order.location.uri()
    directory = order.location.directory(output_dir)
    manifest = read_manifest(directory, source=source)
    if manifest.tenant != order.tenant:
        raise UnknownModel(f"there is no checkpoint {source}")
    _check_fit(manifest, order, source=source)
    verify(directory, manifest, source=source)
    layout = layout_for(order.base_sites, manifest.lora)
    weights = read_peft(directory, layout, source=source)
    if not order.with_optimizer:
        return AdapterContent(manifest=manifest, weights=to_bytes(weights))
    exp_avg, exp_avg_sq = _read_moments(directory, layout, source=source)
    return AdapterContent(
        manifest=manifest, weights=to_bytes(weights), exp_avg=to_bytes(exp_avg), exp_avg_sq=to_bytes(exp_avg_sq)
    )


def _check_fit(manifest: Manifest, order: LoadOrder, *, source: str) -> None:
    if manifest.base_model not in order.base_models:
        raise InvalidRequest(
            f"checkpoint {source} was trained on {manifest.base_model!r}; this server runs {order.base_models[0]!r}"
        )
    if manifest.lora.rank > order.max_lora_rank:
        raise InvalidRequest(
            f"checkpoint {source} has LoRA rank {manifest.lora.rank}; this server allows up to {order.max_lora_rank}"
        )
    if order.expected is not None and _shape(manifest.lora) != _shape(order.expected):
        raise InvalidRequest(
            f"checkpoint {source} has {_shape(manifest.lora)}; the model has {_shape(order.expected)}. "
            "Create a new model from the checkpoint instead"
        )
    if order.with_optimizer and not manifest.has_optimizer:
        raise InvalidRequest(
            f"checkpoint {source} holds no optimizer state ({manifest.kind}); load it with optimizer set to false"
        )


def _shape(spec: LoraSpec) -> str:
    """Everything of a spec that the shapes depend on."""
    switches = ", ".join(f"{name} {getattr(spec, name)}" for name in ("train_attn", "train_mlp", "train_unembed"))
    return f"rank {spec.rank}, {switches}"


def _read_moments(directory: Path, layout: AdapterLayout, *, source: str) -> tuple[Tensor, Tensor]:
    tensors = read_tensors(directory / OPTIMIZER_FILE, source=source)
    return _flat(tensors, "exp_avg", layout, source=source), _flat(tensors, "exp_avg_sq", layout, source=source)


def _flat(tensors: dict[str, Tensor], name: str, layout: AdapterLayout, *, source: str) -> Tensor:
    flat = torch.empty(layout.num_params, dtype=torch.float32)
    for site, pair in layout.named_views(flat).items():
        for part, view in zip("ab", pair, strict=True):
            value = tensors.get(f"{name}.{site}.{part}")
            if value is None or value.shape != view.shape:
                raise InvalidRequest(f"checkpoint {source}: the optimizer state of {site} does not fit this model")
            view.copy_(value)
    return flat
