"""A full-weight model of a snapshot put back on every rank.

A model is too large for one message: rank 0 reads its files, and the tensors go to the others one by one, in parts.
"""

import torch

from gradstream.engine.finite import fits
from gradstream.engine.models.full import FullModel
from gradstream.engine.numerics import master_dtype
from gradstream.engine.optim.state import state_parts
from gradstream.engine.parallel.agree import on_leader
from gradstream.engine.snapshot.cut import Cut, ModelEntry
from gradstream.engine.snapshot.shards import torch_dtype
from gradstream.engine.snapshot.state import GRAD, WEIGHTS, owner_of
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.engine.state import EngineState
from gradstream.engine.trained import Training
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import ModelId


def check_full(state: EngineState, entry: ModelEntry, *, what: str) -> None:
    """Raise StorageFailure, naming the model by what, unless it can be trained on here."""
    if state.config.is_lora:
        raise StorageFailure(f"{what} is of full weights, and this server trains LoRA adapters (enable_lora: true)")
    if state.flat.layout.digest != entry.layout_digest:
        raise StorageFailure(f"{what} does not fit this base model: it is of weights with other names or shapes")
    wanted = _wanted(state, entry)
    found = {name: (torch_dtype(tensor), tensor.shape) for name, tensor in entry.tensors.items()}
    for name, (dtype, shape) in wanted.items():
        if found.get(name) != (dtype, shape):
            raise StorageFailure(
                f"{what} does not fit this server: its {name!r} is {found.get(name)}, and {(dtype, shape)} is needed "
                "(see enable_mixed_precision, master_dtype)"
            )


def restore_full(state: EngineState, store: SnapshotStore, cut: Cut, model_id: ModelId) -> FullModel:
    """The model as it was, in the place of the one that is here; collective, after `check_full`.

    Raises StorageFailure, with all models as they were, when a file cannot be read.
    """
    entry = cut.models[model_id]
    read: dict[str, torch.Tensor] = {}

    def work() -> bytes:
        read.update(store.read(cut, model_id).tensors)
        if not bool(fits(read[WEIGHTS], state.base.compute_dtype)):
            raise StorageFailure(f"snapshot {cut.name}: weights of model {model_id} are not finite")
        return b""

    on_leader(state.comm, work)
    state.flat.move(state.flat.device)
    # Two of this size may not fit into memory at a time.
    state.models.clear()
    model = FullModel(
        owner=owner_of(model_id, entry),
        flat=state.flat,
        master_dtype=master_dtype(state.config, state.base),
        training=Training(optimizer=entry.optimizer, reduction=entry.reduction),
    )
    targets = {WEIGHTS: model.weights, **model.optim}
    if entry.has_grad:
        targets[GRAD] = model.grad
    for name, target in targets.items():
        if state.comm.is_leader:
            target.copy_(read.pop(name))
        state.comm.broadcast_(target)
    model.sync()
    model.step = entry.step
    model.optim_began = entry.optim_began
    model.has_grad = entry.has_grad
    model.valid_tokens = entry.valid_tokens
    if entry.is_asleep:
        model.move(torch.device("cpu"))
        model.is_asleep = True
    return model


def _wanted(state: EngineState, entry: ModelEntry) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each tensor that such a model has here."""
    layout = state.flat.layout
    shape = (layout.num_params,)
    dtype = master_dtype(state.config, state.base)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {WEIGHTS: (dtype, shape)}
    for part in state_parts(entry.optimizer, layout, weights_dtype=dtype):
        wanted[part.name] = (part.dtype, (part.numel,))
    if entry.has_grad:
        wanted[GRAD] = (torch.float32, shape)
    return wanted
