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
from gradstream.engine.checkpoint.start import Start
from gradstream.engine.config import Merging
from gradstream.engine.optim._base import StatePart
from gradstream.engine.optim.state import named_state, new_state, state_parts
from gradstream.shared.errors import InvalidRequest, UnknownModel
from gradstream.shared.hyperparameters import check_fits
from gradstream.shared.ids import TenantId
from gradstream.shared.wire import LoraSpec, OptimizerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """Which checkpoint for whom. base_models: every name of the base model that runs here, the main one first.

    max_merged_rank: of an adapter with all that was merged. tenant None: whosever it is. expected is the spec that the checkpoint must
    have, None for any; optimizer the one that its state must be of, if that is loaded.
    """

    location: Location | Start
    tenant: TenantId | None
    base_models: Sequence[str]
    base_sites: Sequence[Site]
    max_lora_rank: int
    max_merged_rank: int = Merging().max_rank
    with_optimizer: bool = False
    expected: LoraSpec | None = None
    optimizer: OptimizerSpec | None = None


def load_content(order: LoadOrder, output_dir: Path) -> AdapterContent:
    """The checkpoint's contents; runs on one rank only.

    Raises UnknownModel when there is none (or it is another tenant's), InvalidRequest when it does not fit this engine or this
    model or has no optimizer although one is asked for, StorageFailure when it is damaged or cannot be read.
    """
    source = order.location.uri()
    directory = order.location.directory(output_dir)
    manifest = own_manifest(directory, tenant=order.tenant, source=source)
    lora = _check_fit(manifest, order, source=source)
    verify(directory, manifest, source=source)
    layout = layout_for(order.base_sites, lora)
    weights = read_peft(directory, layout.of_rank(manifest.stored_rank), source=source)
    if not order.with_optimizer:
        return AdapterContent(manifest=manifest, weights=to_bytes(weights))
    if order.optimizer is not None:
        parts = [state_parts(spec, layout) for spec in (manifest.optimizer, order.optimizer)]
        check_same_optimizer(manifest.optimizer, order.optimizer, *parts, source=source)
    state = _read_state(directory, manifest.optimizer, layout, source=source)
    optim = {name: to_bytes(flat) for name, flat in state.items()}
    return AdapterContent(manifest=manifest, weights=to_bytes(weights), has_optimizer=True, optim=optim)


def own_manifest(directory: Path, *, tenant: TenantId | None, source: str) -> Manifest:
    """The manifest of one of the tenant's checkpoints, None for anybody's; raises UnknownModel when there is none, StorageFailure."""
    manifest = read_manifest(directory, source=source)
    if tenant is not None and manifest.tenant != tenant:
        raise UnknownModel(f"there is no checkpoint {source}")
    return manifest


def check_base(manifest: Manifest, base_models: Sequence[str], *, source: str) -> None:
    """Raise InvalidRequest unless the checkpoint was trained on one of these."""
    if manifest.base_model not in base_models:
        raise InvalidRequest(
            f"checkpoint {source} was trained on {manifest.base_model!r}; this server runs {base_models[0]!r}"
        )


def check_optimizer_there(manifest: Manifest, *, source: str) -> None:
    """Raise InvalidRequest when there is no optimizer state to load."""
    if not manifest.has_optimizer:
        raise InvalidRequest(
            f"checkpoint {source} holds no optimizer state ({manifest.kind}); load it with optimizer set to false"
        )


def _check_fit(manifest: Manifest, order: LoadOrder, *, source: str) -> LoraSpec:
    """The spec of the adapter in the checkpoint; raises InvalidRequest when it cannot be used here."""
    lora = manifest.lora
    if lora is None:
        raise InvalidRequest(
            f"checkpoint {source} holds full weights; this server trains LoRA adapters, and one that is to load it must be "
            "started with enable_lora: false"
        )
    check_base(manifest, order.base_models, source=source)
    if lora.rank > order.max_lora_rank:
        raise InvalidRequest(
            f"checkpoint {source} has LoRA rank {lora.rank}; this server allows up to {order.max_lora_rank}"
        )
    if manifest.num_merges and manifest.stored_rank > order.max_merged_rank:
        raise InvalidRequest(
            f"checkpoint {source} has LoRA rank {manifest.stored_rank} with its {manifest.num_merges} merges; this server allows up to "
            f"{order.max_merged_rank} (max_merged_lora_rank)"
        )
    if order.expected is not None and _shape(lora) != _shape(order.expected):
        raise InvalidRequest(
            f"checkpoint {source} has {_shape(lora)}; the model has {_shape(order.expected)}. "
            "Create a new model from the checkpoint instead"
        )
    check_fits(manifest.scale, f"checkpoint {source}: the adapter's scale (alpha / rank)")
    if order.with_optimizer:
        check_optimizer_there(manifest, source=source)
    return lora


def _shape(spec: LoraSpec) -> str:
    """Everything of a spec that the shapes depend on."""
    switches = ", ".join(f"{name} {getattr(spec, name)}" for name in ("train_attn", "train_mlp", "train_unembed"))
    modules = "" if spec.target_modules is None else f", modules {' '.join(sorted(spec.target_modules))}"
    return f"rank {spec.rank}, {switches}{modules}"


def is_same_optimizer(
    saved: OptimizerSpec, own: OptimizerSpec, saved_parts: list[StatePart], own_parts: list[StatePart]
) -> bool:
    """True when what one optimizer remembers, in its parts, is what the other needs."""
    return saved.type == own.type and saved_parts == own_parts


def check_same_optimizer(
    saved: OptimizerSpec, own: OptimizerSpec, saved_parts: list[StatePart], own_parts: list[StatePart], *, source: str
) -> None:
    """Raise InvalidRequest when what one optimizer remembers, in its parts, means nothing to the other."""
    if not is_same_optimizer(saved, own, saved_parts, own_parts):
        raise InvalidRequest(
            f"checkpoint {source} holds the state of {_as_text(saved)}; this model trains by {_as_text(own)}. "
            "Load it with optimizer set to false, or into a model with that optimizer"
        )


def _as_text(spec: OptimizerSpec) -> str:
    momentum = f", momentum {spec.momentum:g}" if spec.type == "sgd" else ""
    return f"{spec.type} (state in {spec.dtype}{momentum})"


def _read_state(directory: Path, spec: OptimizerSpec, layout: AdapterLayout, *, source: str) -> dict[str, Tensor]:
    """The optimizer's tensors; raises InvalidRequest, naming the parameter, when one is not there as the layout says."""
    found = read_tensors(directory / OPTIMIZER_FILE, source=source)
    parts = state_parts(spec, layout)
    state = new_state(parts, device=torch.device("cpu"))
    for name, view in named_state(parts, state).items():
        value = found.get(name)
        if value is None or value.shape != view.shape or value.dtype != view.dtype:
            raise InvalidRequest(f"checkpoint {source}: the optimizer state {name} does not fit this model")
        view.copy_(value)
    return state
