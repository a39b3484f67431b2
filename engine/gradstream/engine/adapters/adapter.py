"""One client's LoRA weights with the state of their optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from gradstream.engine.adapters.factors import Factors
from gradstream.engine.adapters.initial import initial_weights, resolve_seed
from gradstream.engine.adapters.layout import AdapterLayout, LoraPair, Site, layout_for
from gradstream.engine.optim.state import new_state, state_parts
from gradstream.engine.trained import Owner as Owner
from gradstream.engine.trained import Training
from gradstream.shared.ids import ModelId, TenantId
from gradstream.shared.wire import LoraSpec


class LoraWeights(Protocol):
    """What a pass needs of an adapter. layout: of a gradient, so of the trained factors. scale: alpha / rank. factors: all of them."""

    @property
    def layout(self) -> AdapterLayout: ...
    @property
    def scale(self) -> float: ...
    @property
    def factors(self) -> Factors: ...


@dataclass(frozen=True)
class FrozenAdapter:
    """Weights that never change again; samplers hold these. weights: fp32 [num_params]."""

    layout: AdapterLayout
    scale: float
    weights: Tensor

    @cached_property
    def factors(self) -> Factors:
        return Factors(self.layout, self.weights)


class Adapter:
    """A trainable adapter, a `TrainedModel`. weights and grad are flat fp32 [layout.num_params], optim the optimizer's tensors.

    These tensors stay the same objects for life. step counts optimizer updates. has_grad says that something was accumulated since the
    last one, of valid_tokens tokens. Restoring a checkpoint copies into the tensors and sets step and has_grad.

    factors: what passes compute with. Before the first merge (see adapters.merging) these are the weights themselves; afterwards they
    hold what was merged, and behind it a copy of the weights, which `sync` brings up to date.
    """

    def __init__(
        self,
        *,
        owner: Owner,
        layout: AdapterLayout,
        scale: float,
        weights: Tensor,
        training: Training | None = None,
    ) -> None:
        """training None: the defaults."""
        training = Training() if training is None else training
        self.owner = owner
        self.layout = layout
        self.scale = scale
        self.weights = weights
        self.grad = torch.zeros_like(weights)
        self.optimizer = training.optimizer
        self.optim = new_state(state_parts(self.optimizer, layout), device=weights.device)
        self.reduction = training.reduction
        self.step = 0
        self.optim_began = 0
        self.has_grad = False
        self.valid_tokens = 0
        self.factors = Factors(layout, weights)

    @property
    def exp_avg(self) -> Tensor:
        """The first moment; only of optimizers that have one."""
        return self.optim["exp_avg"]

    @property
    def exp_avg_sq(self) -> Tensor:
        """The second moment; only of optimizers that have one."""
        return self.optim["exp_avg_sq"]

    @property
    def model_id(self) -> ModelId:
        return self.owner.model_id

    @property
    def tenant(self) -> TenantId:
        return self.owner.tenant

    @property
    def spec(self) -> LoraSpec:
        assert self.owner.spec is not None
        return self.owner.spec

    def named_views(self, flat: Tensor) -> dict[str, LoraPair]:
        """Views into any flat tensor of this adapter's layout, by site name."""
        return self.layout.named_views(flat)

    def clear_grad(self) -> None:
        """Forget what was accumulated."""
        self.grad.zero_()
        self.has_grad = False
        self.valid_tokens = 0

    def reset_optimizer(self) -> None:
        """Its state as before the first update."""
        for tensor in self.optim.values():
            tensor.zero_()
        self.optim_began = self.step

    @property
    def num_merges(self) -> int:
        return self.factors.frozen_rank // self.layout.rank

    def frozen_factors(self) -> Tensor | None:
        """A flat copy of the factors that merges froze, in host memory, in the layout of their rank; None when there are none."""
        return self.factors.frozen_factors()

    @torch.no_grad()
    def take(self, factors: Factors) -> None:
        """Train the last ones of these factors, and compute with all of them.

        They are this adapter's own from now on if some are frozen, and must be where the weights are; else they are only copied from.
        """
        frozen_rank = factors.frozen_rank
        assert factors.layout.rank == frozen_rank + self.layout.rank
        if not frozen_rank:
            self.weights.copy_(factors.weights)
            self.factors = Factors(self.layout, self.weights)
            return
        assert factors.weights.device == self.weights.device
        factors.get(self.layout.pairs(self.weights), first=frozen_rank)
        self.factors = factors

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the weights to where passes read them, if that is elsewhere."""
        if self.factors.frozen_rank:
            self.factors.put(self.layout.pairs(self.weights), first=self.factors.frozen_rank)

    def frozen_copy(self) -> FrozenAdapter:
        """A copy of all factors, trained ones too, as they are now."""
        return FrozenAdapter(layout=self.factors.layout, scale=self.scale, weights=self.factors.weights.clone())


def scale_of(spec: LoraSpec, *, lora_alpha: float) -> float:
    """By what the product of a fresh adapter's factors is multiplied: alpha / rank, with the spec's own alpha if it has one."""
    return (lora_alpha if spec.alpha is None else spec.alpha) / spec.rank


def new_adapter(
    owner: Owner,
    *,
    base_sites: Sequence[Site],
    lora_alpha: float,
    engine_seed: int,
    device: torch.device,
    training: Training | None = None,
) -> Adapter:
    """A fresh adapter: b is zero and a is drawn from the spec's seed, or from (engine_seed, model id) when it has none.

    training None: the defaults. The values depend on nothing else: not on other adapters, the device or the number of ranks.
    Raises InvalidRequest when the spec trains nothing.
    """
    assert owner.spec is not None
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
    return Adapter(
        owner=resolved,
        layout=layout,
        scale=scale_of(spec, lora_alpha=lora_alpha),
        weights=weights,
        training=training,
    )
