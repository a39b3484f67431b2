"""Puts the full weights of a checkpoint into a model: rank 0 reads, the others get what it read.

Everything is checked before the model is touched, and what is read afterwards was verified and is held open; an error then is one of the
machine, which ends the process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from gradstream.engine.checkpoint import formats
from gradstream.engine.checkpoint.formats._base import FORMATS, MODEL, Reader, Stored
from gradstream.engine.checkpoint.full import parts_of, state_of, weights_of
from gradstream.engine.checkpoint.load import (
    check_base,
    check_optimizer_there,
    check_same_optimizer,
    own_manifest,
)
from gradstream.engine.checkpoint.manifest import FullFacts, Manifest, verify
from gradstream.engine.checkpoint.start import CHANGED, files_digest
from gradstream.engine.finite import fits
from gradstream.engine.models.full import FullModel
from gradstream.engine.optim.state import state_parts
from gradstream.engine.parallel.agree import on_leader
from gradstream.engine.registry import import_siblings
from gradstream.engine.state import EngineState
from gradstream.shared.errors import InvalidRequest, StorageFailure
from gradstream.shared.ids import TenantId

import_siblings(formats)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullOrder:
    """Which checkpoint. source: its name in messages. tenant, base_models: whose it must be and of what, None where that does not matter.

    digest: of what its files must hold, None for anything.
    """

    directory: Path
    source: str
    tenant: TenantId | None
    base_models: Sequence[str] | None
    with_optimizer: bool
    digest: str | None = None


def load_full(state: EngineState, model: FullModel, order: FullOrder) -> Manifest:
    """Restore weights, and the optimizer's state and step or fresh ones; the accumulated gradient is gone. Collective.

    Raises UnknownModel when there is no such checkpoint, InvalidRequest when it does not fit the model, StorageFailure when it is
    damaged; the model is then as it was.
    """
    opened: list[Reader] = []

    def work() -> bytes:
        manifest, reader = _open(order, model, state.flat.frozen)
        opened.append(reader)
        return msgspec.msgpack.encode(manifest)

    manifest = msgspec.msgpack.decode(on_leader(state.comm, work), type=Manifest)
    try:
        _fill(
            state, model, opened, has_state=order.with_optimizer and facts_of(manifest, source=order.source).has_state
        )
    finally:
        for reader in opened:
            reader.close()
    model.step = manifest.step if order.with_optimizer else 0
    model.clear_grad()
    model.sync()
    return manifest


def facts_of(manifest: Manifest, *, source: str) -> FullFacts:
    """What the manifest says of full weights that can be trained on; raises InvalidRequest when it holds none."""
    if manifest.full is None:
        raise InvalidRequest(
            f"checkpoint {source} is a LoRA adapter; this server trains the full weights of its model, and one that is to load it "
            "must be started with enable_lora: true"
        )
    if manifest.full.format not in FORMATS:
        raise InvalidRequest(
            f"checkpoint {source} holds weights rounded for inference ({manifest.kind}); load one that save_weights made"
        )
    return manifest.full


def _fill(state: EngineState, model: FullModel, opened: Sequence[Reader], *, has_state: bool) -> None:
    """Rank 0 reads into its own tensors, which then go to the others in parts."""
    for reader in opened:
        reader.read(weights_of(model.layout, model.weights))
        if has_state:
            reader.read(state_of(model))
    state.comm.broadcast_(model.weights)
    for tensor in model.optim.values():
        if has_state:
            state.comm.broadcast_(tensor)
        else:
            tensor.zero_()


def _open(order: FullOrder, model: FullModel, frozen: Mapping[str, Tensor]) -> tuple[Manifest, Reader]:
    source = order.source
    manifest = own_manifest(order.directory, tenant=order.tenant, source=source)
    if order.digest is not None and files_digest(manifest) != order.digest:
        raise StorageFailure(CHANGED.format(source))
    full = facts_of(manifest, source=source)
    if order.base_models is not None:
        check_base(manifest, order.base_models, source=source)
    if order.with_optimizer:
        _check_optimizer(manifest, full, model, source=source)
    verify(order.directory, manifest, source=source)
    reader = FORMATS[full.format].open(order.directory)
    try:
        _check_weights(reader, model, frozen, source=source)
        if order.with_optimizer and full.has_state:
            _check_tensors(reader.tensors, state_of(model), source=source, same_dtype=True)
        _check_finite(reader, model, source=source)
    except BaseException:
        reader.close()
        raise
    return manifest, reader


def _check_optimizer(manifest: Manifest, full: FullFacts, model: FullModel, *, source: str) -> None:
    check_optimizer_there(manifest, source=source)
    dtype = getattr(torch, full.dtype)
    saved = state_parts(manifest.optimizer, model.layout, weights_dtype=dtype)
    check_same_optimizer(manifest.optimizer, model.optimizer, saved, parts_of(model), source=source)
    if dtype.itemsize > model.weights.dtype.itemsize:
        raise InvalidRequest(
            f"checkpoint {source} holds {full.dtype} weights, and this server keeps them in bfloat16 (master_dtype: bf16), so it could "
            "not go on where that one stopped; load it with optimizer set to false, or set master_dtype: fp32"
        )


def _check_weights(reader: Reader, model: FullModel, frozen: Mapping[str, Tensor], *, source: str) -> None:
    """Raise InvalidRequest unless the checkpoint has just the model's parameters, and those that are not trained as they are here."""
    found = reader.tensors
    _check_tensors(found, weights_of(model.layout, model.weights), source=source)
    untrained = {f"{MODEL}{name}": value for name, value in frozen.items()}
    _check_tensors(found, untrained, source=source)
    known = weights_of(model.layout, model.weights).keys() | untrained.keys()
    if extra := sorted(name for name in found if name.startswith(MODEL) and name not in known):
        raise InvalidRequest(f"checkpoint {source} holds {_shown(extra[0])}, which this model does not have")
    for name, own in untrained.items():
        saved = torch.empty(own.shape, dtype=found[name].dtype)
        reader.read({name: saved})
        # Of two roundings of one value the coarser tells.
        coarser = min((saved.dtype, own.dtype), key=lambda dtype: dtype.itemsize)
        if not torch.equal(saved.to(coarser), own.detach().cpu().to(coarser)):
            raise InvalidRequest(
                f"checkpoint {source}: its {_shown(name)} is another than this model's, which is not trained here; set freeze_router: "
                "false to load it"
            )


def _check_finite(reader: Reader, model: FullModel, *, source: str) -> None:
    """Raise InvalidRequest for weights that are not finite, or would not be in the dtype that passes compute in."""
    for name, own in weights_of(model.layout, model.weights).items():
        saved = torch.empty(own.shape, dtype=reader.tensors[name].dtype)
        reader.read({name: saved})
        if not bool(fits(saved, model.flat.weights.dtype)):
            raise InvalidRequest(
                f"checkpoint {source}: {_shown(name)} holds nan, inf, or numbers that {model.flat.weights.dtype} cannot hold"
            )


def _check_tensors(
    found: Mapping[str, Stored], wanted: Mapping[str, Tensor], *, source: str, same_dtype: bool = False
) -> None:
    for name, tensor in wanted.items():
        stored = found.get(name)
        if stored is None:
            raise InvalidRequest(f"checkpoint {source} lacks {_shown(name)}, so it is of another model")
        if stored.shape != tuple(tensor.shape):
            raise InvalidRequest(
                f"checkpoint {source}: {_shown(name)} has shape {list(stored.shape)}; this model needs {list(tensor.shape)}"
            )
        if same_dtype and stored.dtype != tensor.dtype:
            raise InvalidRequest(
                f"checkpoint {source}: {_shown(name)} is {stored.dtype}; this model needs {tensor.dtype}"
            )


def _shown(name: str) -> str:
    return repr(name.removeprefix(MODEL))
