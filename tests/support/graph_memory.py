"""What autograd keeps of a forward pass."""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.adapters.slices import AdapterSlice
from gradstream.engine.models.base import BaseModel
from tests.support.engine_builders import Driver
from tests.support.switches import MODEL


class Saved:
    """Within the block, the storages that autograd saves, without those of a model's parameters."""

    def __init__(self, base: BaseModel) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in base.causal_lm.parameters()}
        self._found: dict[int, Tensor] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._found.values())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's

    def _pack(self, tensor: Tensor) -> Tensor:
        # Held, so that no other tensor gets the same address.
        if tensor.untyped_storage().data_ptr() not in self._known:
            self._found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor


def training_hidden(driver: Driver, num_tokens: int = 64) -> Tensor:
    """The hidden states of a training pass of the driver's model."""
    base = driver.engine.state.base
    model = driver.engine.state.models[MODEL]
    adapters = None
    if base.flat is None:
        part = AdapterSlice(start=0, end=num_tokens, weights=model, grad=torch.zeros_like(model.grad))  # type: ignore[arg-type]
        adapters = AdapterPass([part], compute_dtype=base.compute_dtype)
    tokens = torch.randint(base.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(3))
    context = base.packed([num_tokens])
    return base.hidden(tokens, context.segments.positions, attention=context, adapters=adapters)


def saved_bytes(driver: Driver) -> int:
    """Of the activations that a training pass keeps."""
    with Saved(driver.engine.state.base) as saved:
        training_hidden(driver)
    return saved.num_bytes
