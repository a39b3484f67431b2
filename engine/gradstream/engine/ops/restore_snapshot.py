"""Models of a snapshot put into every rank's memory, as they were: weights, optimizer, accumulated gradient and step."""

from pathlib import Path

import msgspec
import torch

from gradstream.engine.adapters.layout import AdapterLayout, layout_for
from gradstream.engine.checkpoint.snapshot import to_bytes, to_tensor
from gradstream.engine.finite import fits
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.parallel.agree import on_leader
from gradstream.engine.snapshot.cut import Cut, ModelEntry
from gradstream.engine.snapshot.full import check_full, restore_full
from gradstream.engine.snapshot.shards import torch_dtype
from gradstream.engine.snapshot.state import FROZEN, WEIGHTS, ModelState, check_tensors, owner_of
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.engine.state import EngineState
from gradstream.shared.errors import GradstreamError, StorageFailure
from gradstream.shared.hyperparameters import check_fits
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import RestoredModel, RestoreSnapshot, RestoreSnapshotDone


@OPS.register(RestoreSnapshot)
@each
def restore_snapshot(state: EngineState, job: OpJob[RestoreSnapshot]) -> RestoreSnapshotDone:
    """Rank 0 verifies and reads; every rank then holds the same models. A model that is here already is replaced.

    Adapters are parked until a job needs them: those of a cut need not have room on the device together.
    A model that does not fit the base model is not restored, and told in `failed`. Raises StorageFailure, with all models in memory
    as they were, when the cut or one of its files is missing or damaged.
    """
    payload = job.payload
    store = SnapshotStore(Path(payload.directory))
    cut = _find(state, store, payload)
    restored = state.models.empty()
    failed: dict[ModelId, str] = {}
    for model_id, entry in cut.models.items():
        what = f"snapshot {cut.name}: model {model_id}"
        try:
            layout = _check(state, entry, what=what)
        except StorageFailure as failure:
            failed[model_id] = failure.message
            continue
        if layout is None:
            restored[model_id] = restore_full(state, store, cut, model_id)
        else:
            restored.put_parked(_read(state, store, cut, model_id, layout), layout)
    steps = {model_id: cut.models[model_id].step for model_id in restored}
    tenants = restored.tenants()
    state.models.take(restored, drop_others=payload.drop_others)
    models = [RestoredModel(model_id=model_id, tenant=tenants[model_id], step=step) for model_id, step in steps.items()]
    return RestoreSnapshotDone(models=models, failed=failed)


def _find(state: EngineState, store: SnapshotStore, payload: RestoreSnapshot) -> Cut:
    """The cut with the models that are asked for, all of their files verified; collective."""

    def work() -> bytes:
        cut = store.find((payload.epoch, payload.number))
        wanted = list(cut.models) if payload.model_ids is None else payload.model_ids
        if missing := [model_id for model_id in wanted if model_id not in cut.models]:
            raise StorageFailure(f"snapshot {cut.name} holds no model {missing[0]}")
        store.verify(cut, wanted)
        models = {model_id: cut.models[model_id] for model_id in wanted}
        return msgspec.msgpack.encode(Cut(head=cut.head, models=models))

    return msgspec.msgpack.decode(on_leader(state.comm, work), type=Cut)


def _check(state: EngineState, entry: ModelEntry, *, what: str) -> AdapterLayout | None:
    """The layout of an adapter, None for a full-weight model; raises StorageFailure, naming the model by what, when it does not fit."""
    if entry.kind == "full":
        check_full(state, entry, what=what)
        return None
    if not state.config.is_lora or entry.spec is None:
        raise StorageFailure(f"{what} is a LoRA adapter, and this server trains full weights (enable_lora: false)")
    try:
        check_fits(entry.scale, "scale")
        layout = layout_for(state.base.sites, entry.spec)
    except GradstreamError as error:
        raise StorageFailure(f"{what} does not fit this base model: {error.message}") from error
    if layout.digest != entry.layout_digest:
        raise StorageFailure(
            f"{what} does not fit this base model: its adapter (rank {entry.spec.rank}) is of weights with other names or shapes"
        )
    return layout


def _read(state: EngineState, store: SnapshotStore, cut: Cut, model_id: ModelId, layout: AdapterLayout) -> ModelState:
    """The adapter's state as it was, on every rank; collective.

    Raises StorageFailure when a file cannot be read, or does not hold what the layout and the optimizer need.
    """
    entry = cut.models[model_id]

    def work() -> bytes:
        model = store.read(cut, model_id)
        factors = [model.tensors[name] for name in (WEIGHTS, FROZEN) if name in model.tensors]
        if not all(bool(fits(flat, state.base.compute_dtype)) for flat in factors):
            raise StorageFailure(f"snapshot {cut.name}: weights of model {model_id} are not finite")
        return msgspec.msgpack.encode({name: to_bytes(tensor) for name, tensor in model.tensors.items()})

    data = msgspec.msgpack.decode(on_leader(state.comm, work), type=dict[str, bytes])
    model = ModelState(
        owner=owner_of(model_id, entry),
        scale=entry.scale,
        step=entry.step,
        has_grad=entry.has_grad,
        layout_digest=entry.layout_digest,
        optim_began=entry.optim_began,
        optimizer=entry.optimizer,
        reduction=entry.reduction,
        valid_tokens=entry.valid_tokens,
        tensors={
            name: to_tensor(values, dtype=torch_dtype(entry.tensors[name]), device=torch.device("cpu"))
            for name, values in data.items()
        },
    )
    check_tensors(model, layout)
    return model
