"""Fused experts whose weights are trained.

Legend: T tokens, N token-expert pairs, D hidden, E experts, F expert hidden, C experts a token goes to.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstream.engine.models.full_linear import trained_linear


class FullExperts(nn.Module):
    """Fused experts (gate_up [E, 2F, D], down [E, D, F]) with gradients by autograd.

    Each expert sees its tokens once, in the row's order. The experts are taken apart by one unbind, whose backward pass makes one
    gradient of the whole; transformers' loop makes one for each expert.
    """

    def __init__(self, base: nn.Module, *, is_grouped: bool = False) -> None:
        """is_grouped: torch's grouped product; else one product for each expert that has tokens."""
        super().__init__()
        self._is_grouped = is_grouped
        self.gate_up_proj = base.get_parameter("gate_up_proj")
        self.down_proj = base.get_parameter("down_proj")
        # The hook that transformers gives every experts class; a bound method, so base stays alive but is no submodule of this one.
        self._gate: Callable[[Tensor], Tensor] = base._apply_gate  # type: ignore[assignment]  # noqa: SLF001

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, D], index and weights [T, C] -> [T, D]."""
        num_tokens, num_choices = top_k_index.shape
        num_experts = self.gate_up_proj.shape[0]
        expert_N, order_N = top_k_index.flatten().sort(stable=True)
        x_ND = hidden_states[order_N // num_choices]
        if self._is_grouped:
            experts_E = torch.arange(num_experts, device=expert_N.device)
            out_ND = self._grouped(x_ND, torch.searchsorted(expert_N, experts_E, right=True).to(torch.int32))
        else:
            out_ND = self._one_by_one(x_ND, torch.bincount(expert_N, minlength=num_experts).tolist())
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        out_TCD = out_ND[place_N].view(num_tokens, num_choices, -1)
        return (out_TCD * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    def _one_by_one(self, x_ND: Tensor, counts_E: list[int]) -> Tensor:
        outs_ND = []
        experts = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), torch.split(x_ND, counts_E), strict=True)
        for gate_up_2FD, down_DF, own_ND in experts:
            if len(own_ND):
                outs_ND.append(trained_linear(self._gate(trained_linear(own_ND, gate_up_2FD)), down_DF))
        return torch.cat(outs_ND)

    def _grouped(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        gate_up_N2F = F.grouped_mm(x_ND, self.gate_up_proj.transpose(1, 2), offs=ends_E)
        return F.grouped_mm(self._gate(gate_up_N2F), self.down_proj.transpose(1, 2), offs=ends_E)
