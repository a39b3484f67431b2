"""The torch modules that stand in for a base model's linear layers and experts.

Legend: T tokens, N token-expert pairs, D hidden, E experts, F expert hidden, C experts a token goes to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradstream.engine.adapters.layout import LoraPair, Site
from gradstream.engine.adapters.linear import Block, Groups, lora_linear
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.adapters.slices import Patch
from gradstream.engine.products import LinearProduct, linear


@dataclass(slots=True)
class PassSlot:
    """Where a base model's modules find the adapters of the running pass; one per base model, set by BaseModel.hidden.

    product: how frozen weights are multiplied in it.
    """

    current: AdapterPass | None = None
    product: LinearProduct = linear


class AdaptedLinear(nn.Module):
    """A frozen nn.Linear that adds the running pass's adapters."""

    def __init__(self, base: nn.Linear, *, site: Site, slot: PassSlot) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.site_index = site.index
        self.slot = slot

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, in] -> [1, T, out]."""
        adapters = self.slot.current
        if adapters is None:
            return nn.functional.linear(x, self.weight, self.bias)
        patches = adapters.grouped_patches(self.site_index)
        anchor = adapters.anchor if adapters.is_training else None
        block = Block(0, x.shape[-2], self.weight, self.slot.product)
        return lora_linear(x, [block], self.bias, patches, anchor)


class AdaptedExperts(nn.Module):
    """Frozen fused experts (gate_up [E, 2F, D], down [E, D, F]) that add the running pass's adapters.

    Token-expert pairs are sorted by expert; inside an expert they stay in token order, so that an adapter's slice of the row is one
    contiguous run in every expert.
    """

    def __init__(
        self, base: nn.Module, *, gate_up_site: Site, down_site: Site, slot: PassSlot, is_grouped: bool = False
    ) -> None:
        """is_grouped: torch's grouped product; else one product for each expert that has tokens."""
        super().__init__()
        self.gate_up_proj = base.get_parameter("gate_up_proj")
        self.down_proj = base.get_parameter("down_proj")
        # The hook that transformers gives every experts class; a bound method, so base stays alive but is no submodule of this one.
        self._gate: Callable[[Tensor], Tensor] = base._apply_gate  # type: ignore[assignment]  # noqa: SLF001
        self._gate_up_site = gate_up_site.index
        self._down_site = down_site.index
        self._num_experts = gate_up_site.num_experts
        self._slot = slot
        self._is_grouped = is_grouped

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, D], index and weights [T, C] -> [T, D]."""
        num_tokens, num_choices = top_k_index.shape
        expert_N, order_N = top_k_index.flatten().sort(stable=True)
        token_N = order_N // num_choices
        bounds_E = torch.searchsorted(expert_N, torch.arange(self._num_experts + 1, device=expert_N.device))
        ends_E = bounds_E[1:].to(torch.int32) if self._is_grouped else None
        routes = _Routes(token_N=token_N, bounds=bounds_E.tolist(), ends_E=ends_E)
        adapters = self._slot.current

        gate_up_N2F = self._linear(hidden_states[token_N], self.gate_up_proj, self._gate_up_site, adapters, routes)
        gated_NF = self._gate(gate_up_N2F)
        out_ND = self._linear(gated_NF, self.down_proj, self._down_site, adapters, routes)

        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        out_TCD = out_ND[place_N].view(num_tokens, num_choices, -1)
        return (out_TCD * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    @staticmethod
    def _linear(x_N: Tensor, weight_E: Tensor, site: int, adapters: AdapterPass | None, routes: "_Routes") -> Tensor:
        patches = [] if adapters is None else routes.split(adapters.patches(site))
        anchor = adapters.anchor if adapters is not None and adapters.is_training else None
        return lora_linear(x_N, routes.products(weight_E), None, patches, anchor)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routes:
    """token_N: the row's token of each pair, sorted by expert and then token. bounds: first pair of each expert, and N.

    ends_E: bounds[1:] on the device, where the experts are one grouped product.
    """

    token_N: Tensor
    bounds: list[int]
    ends_E: Tensor | None

    def products(self, weight_E: Tensor) -> list[Block] | Groups:
        """Which pairs go through which of the experts' weights."""
        if self.ends_E is not None:
            return Groups(self.ends_E, weight_E)
        return [
            Block(start, end, weight_E[expert])
            for expert, (start, end) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True))
            if end > start
        ]

    def split(self, patches: list[Patch]) -> list[Patch]:
        """Each patch cut into one patch per expert that sees its tokens, with that expert's factors."""
        parts: list[Patch] = []
        for expert, (start, end) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            if start == end:
                continue
            edges = torch.tensor([edge for patch in patches for edge in (patch.start, patch.end)])
            cuts = torch.searchsorted(self.token_N[start:end], edges.to(self.token_N.device)).tolist()
            for i, patch in enumerate(patches):
                first, last = start + cuts[2 * i], start + cuts[2 * i + 1]
                if first < last:
                    weight, grad = _expert(patch.weight, expert), _of(patch.grad, expert)
                    parts.append(Patch(first, last, patch.scale, weight, grad, patch.frozen_rank))
        return parts


def _expert(pair: LoraPair, expert: int) -> LoraPair:
    return LoraPair(pair.a[expert], pair.b[expert])


def _of(pair: LoraPair | None, expert: int) -> LoraPair | None:
    return None if pair is None else _expert(pair, expert)
