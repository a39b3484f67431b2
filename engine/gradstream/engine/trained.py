"""What an adapter and a full-weight model have in common: flat tensors, where each parameter lies in them, and an optimizer."""

# Shape letters: P all parameters of a model, row-major, one after the other in the order of its layout.

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal, Protocol

from torch import Tensor

from gradstream.shared.ids import ModelId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec, OptimizerSpec

# What an update makes of the accumulated gradient: its sum, or its sum divided by the valid tokens accumulated with it.
Reduction = Literal["sum", "token_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose model it is. spec: of an adapter, its seed resolved; None for the base model's own weights."""

    model_id: ModelId
    tenant: TenantId
    session_id: SessionId
    spec: LoraSpec | None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a model learns, for its life. The defaults are AdamW with fp32 state, of summed gradients."""

    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    reduction: Reduction = "sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamTensor:
    """One parameter: the values start .. stop of a flat tensor [P], row-major.

    is_matrix: it maps features to features, [..., rows, columns] with any batch of matrices before: what muon makes orthogonal.
    Embeddings, the head, routers, norms and biases are not.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    is_matrix: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.numel

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's values in a flat tensor [P]."""
        return flat[self.start : self.stop].view(self.shape)


class TrainedLayout(Protocol):
    """Where the parameters lie. digest: equal for flat tensors that mean the same parameters. tensors: in flat order, without gaps."""

    @property
    def num_params(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def tensors(self) -> Sequence[ParamTensor]: ...


class TrainedModel(Protocol):
    """A model that an optimizer changes.

    weights: the master weights, flat [P], fp32 (bf16 where the engine keeps no master). grad: flat fp32 [P]. optim: the optimizer's
    tensors by name, as `optim.state.state_parts` describes them. These stay the same objects for life. step: updates made; optim_began:
    after how many of them the optimizer's state last began with zeros. has_grad: something was accumulated since the last one.
    valid_tokens: the tokens with a target that were accumulated with it.
    """

    owner: Owner
    weights: Tensor
    grad: Tensor
    optim: dict[str, Tensor]
    optimizer: OptimizerSpec
    reduction: Reduction
    step: int
    optim_began: int
    has_grad: bool
    valid_tokens: int

    @property
    def layout(self) -> TrainedLayout: ...
    @property
    def model_id(self) -> ModelId: ...
    @property
    def tenant(self) -> TenantId: ...

    def clear_grad(self) -> None:
        """Forget what was accumulated, and how many tokens it was."""

    def sync(self) -> None:
        """Make what forward passes compute with follow the weights, after these were changed."""
