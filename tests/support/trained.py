"""A trained model of a few named tensors without an engine, for tests of optimizers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradstream.engine.optim.state import new_state, state_parts
from gradstream.engine.optim.update import update
from gradstream.engine.trained import Owner, ParamTensor, Reduction
from gradstream.shared.ids import LOCAL_TENANT, ModelId, SessionId, TenantId
from gradstream.shared.wire import AdamParams, OptimizerSpec

CPU = torch.device("cpu")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FlatLayout:
    """Tensors in the order of a dict; those whose name begins with `matrix` are matrices."""

    shapes: Shapes

    @cached_property
    def tensors(self) -> list[ParamTensor]:
        tensors: list[ParamTensor] = []
        for name, shape in self.shapes.items():
            start = tensors[-1].stop if tensors else 0
            tensors.append(ParamTensor(name=name, shape=shape, start=start, is_matrix=name.startswith("matrix")))
        return tensors

    @property
    def num_params(self) -> int:
        return self.tensors[-1].stop

    @property
    def digest(self) -> str:
        return str(self.shapes)


class FlatModel:
    """Random weights; the gradient is what a test puts in."""

    def __init__(
        self,
        shapes: Shapes,
        optimizer: OptimizerSpec,
        *,
        dtype: torch.dtype = torch.float32,
        name: str = "m",
        reduction: Reduction = "sum",
    ) -> None:
        self.owner = Owner(model_id=ModelId(name), tenant=LOCAL_TENANT, session_id=SessionId("s"), spec=None)
        self.layout = FlatLayout(shapes)
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(self.layout.num_params, generator=generator).to(dtype)
        self.grad = torch.zeros(self.layout.num_params)
        self.optimizer = optimizer
        self.optim = new_state(state_parts(optimizer, self.layout, weights_dtype=dtype), device=CPU)
        self.reduction: Reduction = reduction
        self.step = 0
        self.optim_began = 0
        self.has_grad = False
        self.valid_tokens = 0
        self.num_syncs = 0

    @property
    def model_id(self) -> ModelId:
        return self.owner.model_id

    @property
    def tenant(self) -> TenantId:
        return self.owner.tenant

    def clear_grad(self) -> None:
        self.grad.zero_()
        self.has_grad = False
        self.valid_tokens = 0

    def sync(self) -> None:
        self.num_syncs += 1

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Copies of each tensor's values in a flat one."""
        return {tensor.name: tensor.view(flat).clone() for tensor in self.layout.tensors}

    def step_with(self, grad: Tensor, *, seed: int = 0, **adam: float) -> None:
        """One update by a flat gradient."""
        self.grad.copy_(grad)
        self.has_grad = True
        update(self, AdamParams(**adam), seed=seed)

    def content(self) -> dict[str, Tensor]:
        """Copies of everything that an update may change."""
        tensors = {"weights": self.weights, "grad": self.grad, **self.optim}
        return {name: tensor.clone() for name, tensor in tensors.items()}


def random_grad(model: FlatModel, seed: int, *, scale: float = 1.0) -> Tensor:
    return torch.randn(model.layout.num_params, generator=torch.Generator().manual_seed(100 + seed)) * scale


def assert_same_bits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8)), name
