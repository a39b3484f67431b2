"""One client's LoRA weights with the state of their optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from gradstream.engine.adapters.initial import initial_weights, resolve_seed
from gradstream.engine.adapters.layout import AdapterLayout, LoraPair, Site, layout_for
from gradstream.shared.ids import ModelId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec


class LoraWeights(Protocol):
    """What a forward pass needs of an adapter: flat fp32 weights, their layout and the scale alpha / rank."""

    @property
    def layout(self) -> AdapterLayout: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def pairs(self) -> dict[int, LoraPair]: ...


@dataclass(frozen=True)
class FrozenAdapter:
    """Weights that never change again; samplers hold these. weights: fp32 [num_params]."""

    layout: AdapterLayout
    scale: float
    weights: Tensor

    @cached_property
    def pairs(self) -> dict[int, LoraPair]:
        return self.layout.pairs(self.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose adapter it is. spec has its seed resolved."""

    model_id: ModelId
    tenant: TenantId
    session_id: SessionId
    spec: LoraSpec
    user_metadata: dict[str, str] | None = None


class Adapter:
    """A trainable adapter. All four tensors are flat fp32 [layout.num_params] and stay the same objects for life.

    step counts optimizer updates. has_grad says that something was accumulated since the last one. Restoring a checkpoint
    copies into the tensors and sets step and has_grad.
    """

    def __init__(self, *, owner: Owner, layout: AdapterLayout, scale: float, weights: Tensor) -> None:
        self.owner = owner
        self.layout = layout
        self.scale = scale
        self.weights = weights
        self.grad = torch.zeros_like(weights)
        self.exp_avg = torch.zeros_like(weights)
        self.exp_avg_sq = torch.zeros_like(weights)
        self.step = 0
        self.has_grad = False
        self.pairs = layout.pairs(weights)

    @property
    def model_id(self) -> ModelId:
        return self.owner.model_id

    @property
    def tenant(self) -> TenantId:
        return self.owner.tenant

    @property
    def spec(self) -> LoraSpec:
        return self.owner.spec

    def named_views(self, flat: Tensor) -> dict[str, LoraPair]:
        """Views into any flat tensor of this adapter's layout, by site name."""
        return self.layout.named_views(flat)

    def clear_grad(self) -> None:
        """Forget what was accumulated."""
        self.grad.zero_()
        self.has_grad = False

    def frozen(self) -> FrozenAdapter:
        """A copy of the weights as they are now."""
        return FrozenAdapter(layout=self.layout, scale=self.scale, weights=self.weights.clone())


def new_adapter(
    owner: Owner, *, base_sites: Sequence[Site], lora_alpha: float, engine_seed: int, device: torch.device
) -> Adapter:
    """A fresh adapter: b is zero and a is drawn from the spec's seed, or from (engine_seed, model id) when it has none.

    The values depend on nothing else: not on other adapters, the device or the number of ranks.
    Raises InvalidRequest when the spec trains nothing.
    """
    layout = layout_for(base_sites, owner.spec)
    seed = resolve_seed(owner.spec.seed, engine_seed=engine_seed, model_id=owner.model_id)
    spec = msgspec.structs.replace(owner.spec, seed=seed)
    resolved = Owner(
        model_id=owner.model_id,
        tenant=owner.tenant,
        session_id=owner.session_id,
        spec=spec,
        user_metadata=owner.user_metadata,
    )
    weights = initial_weights(layout, seed=seed).to(device)
    return Adapter(owner=resolved, layout=layout, scale=lora_alpha / spec.rank, weights=weights)
