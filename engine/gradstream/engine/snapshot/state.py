"""One model's training state in host memory, apart from the engine that goes on training it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.factors import Factors, joined
from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.engine.models.full import FullModel
from gradstream.engine.optim.state import state_parts
from gradstream.engine.snapshot.cut import ModelEntry, ModelKind
from gradstream.engine.trained import Owner, Reduction, TrainedModel, Training
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import OptimizerSpec

WEIGHTS = "weights"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
GRAD = "grad"
FROZEN = "frozen"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A copy of one model between two batches; it shares no memory with the model.

    owner.spec, of an adapter, has its seed resolved. tensors, on the CPU: weights, grad only if has_grad, both flat [num_params] in the
    model's layout, the state of its optimizer by name, and frozen: the frozen factors of an adapter that was merged, in the layout of their
    rank. layout_digest: the digest of the model's layout.
    """

    owner: Owner
    scale: float
    step: int
    has_grad: bool
    layout_digest: str
    tensors: dict[str, Tensor]
    kind: ModelKind = "lora"
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    reduction: Reduction = "sum"
    valid_tokens: int = 0
    is_asleep: bool = False
    optim_began: int = 0

    @property
    def model_id(self) -> ModelId:
        return self.owner.model_id

    @property
    def size_bytes(self) -> int:
        """All tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def copy_of(model: Adapter | FullModel) -> ModelState:
    """A copy of the model as it is now, between two batches."""
    tensors = {WEIGHTS: model.weights, **model.optim}
    if model.has_grad:
        tensors[GRAD] = model.grad
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    frozen = model.frozen_factors() if isinstance(model, Adapter) else None
    if frozen is not None:
        copies[FROZEN] = frozen
    return ModelState(
        owner=model.owner,
        scale=1.0 if isinstance(model, FullModel) else model.scale,
        step=model.step,
        has_grad=model.has_grad,
        layout_digest=model.layout.digest,
        kind="full" if isinstance(model, FullModel) else "lora",
        optimizer=model.optimizer,
        reduction=model.reduction,
        valid_tokens=model.valid_tokens,
        is_asleep=isinstance(model, FullModel) and model.is_asleep,
        optim_began=model.optim_began,
        tensors=copies,
    )


def owner_of(model_id: ModelId, entry: ModelEntry) -> Owner:
    """Whose model one of a cut is."""
    return Owner(
        model_id=model_id,
        tenant=entry.tenant,
        session_id=entry.session_id,
        spec=entry.spec,
        user_metadata=entry.user_metadata,
    )


def check_tensors(model: ModelState, layout: AdapterLayout) -> None:
    """Raise StorageFailure unless the tensors of a "lora" model are those of its optimizer and its layout, as `to_adapter` needs them."""
    needed = {WEIGHTS: (torch.float32, (layout.num_params,))}
    if model.has_grad:
        needed[GRAD] = needed[WEIGHTS]
    for name, wanted in needed.items():
        found = model.tensors.get(name)
        if found is None or (found.dtype, tuple(found.shape)) != wanted:
            raise StorageFailure(
                f"the snapshot of model {model.model_id} does not hold {name!r} as its layout needs it"
            )
    for part in state_parts(model.optimizer, layout):
        found = model.tensors.get(part.name)
        if found is None or (found.dtype, tuple(found.shape)) != (part.dtype, (part.numel,)):
            raise _misfit(model.model_id, part.name, model.optimizer)
    frozen = model.tensors.get(FROZEN)
    if frozen is not None:
        _check_frozen(model.model_id, frozen, layout)


def to_adapter(model: ModelState, layout: AdapterLayout, *, device: torch.device) -> Adapter:
    """A trainable adapter with exactly the contents of a "lora" model; layout has the model's layout_digest.

    Raises StorageFailure when its tensors are not those of its optimizer or its layout.
    """
    assert model.kind == "lora"
    assert model.layout_digest == layout.digest
    adapter = Adapter(
        owner=model.owner,
        layout=layout,
        scale=model.scale,
        weights=model.tensors[WEIGHTS].to(device, copy=True),
        training=Training(optimizer=model.optimizer, reduction=model.reduction),
    )
    put_state(adapter, model.tensors)
    if FROZEN in model.tensors:
        adapter.take(_with_frozen(adapter, model.tensors[FROZEN]))
    if model.has_grad:
        adapter.grad.copy_(model.tensors[GRAD])
    adapter.step = model.step
    adapter.optim_began = model.optim_began
    adapter.has_grad = model.has_grad
    adapter.valid_tokens = model.valid_tokens
    return adapter


def _with_frozen(adapter: Adapter, frozen: Tensor) -> Factors:
    """The frozen factors before the adapter's weights; raises StorageFailure when they are not of the adapter's sites."""
    _check_frozen(adapter.model_id, frozen, adapter.layout)
    return joined(adapter.layout, frozen.to(adapter.weights.device), adapter.weights)


def _check_frozen(model_id: ModelId, frozen: Tensor, layout: AdapterLayout) -> None:
    if frozen.dtype != torch.float32 or not frozen.numel() or frozen.numel() % layout.num_params:
        raise StorageFailure(f"the snapshot of model {model_id} does not hold {FROZEN!r} as its layout needs it")


def _misfit(model_id: ModelId, name: str, optimizer: OptimizerSpec) -> StorageFailure:
    return StorageFailure(
        f"the snapshot of model {model_id} does not hold {name!r} as {optimizer.type} ({optimizer.dtype}) needs it"
    )


def put_state(model: TrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy the optimizer's state out of a snapshot's tensors; raises StorageFailure, before any is copied, when one does not fit."""
    for name, target in model.optim.items():
        found = tensors.get(name)
        if found is None or found.dtype != target.dtype or found.shape != target.shape:
            raise _misfit(model.model_id, name, model.optimizer)
    for name, target in model.optim.items():
        target.copy_(tensors[name])
