"""Fused experts whose weights are trained.

Legend: T tokens, N token-expert pairs, D hidden, E experts, F expert hidden, C experts a token goes to.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FullExperts(nn.Module):
    """Fused experts (gate_up [E, 2F, D], down [E, D, F]) with gradients by autograd.

    Each expert sees its tokens once, in the row's order. The experts are taken apart by one unbind, whose backward pass makes one
    gradient of the whole; transformers' loop makes one for each expert.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = base.get_parameter("gate_up_proj")
        self.down_proj = base.get_parameter("down_proj")
        # The hook that transformers gives every experts class; a bound method, so base stays alive but is no submodule of this one.
        self._gate: Callable[[Tensor], Tensor] = base._apply_gate  # type: ignore[assignment]  # noqa: SLF001

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, D], index and weights [T, C] -> [T, D]."""
        num_tokens, num_choices = top_k_index.shape
        num_experts = self.gate_up_proj.shape[0]
        expert_N, order_N = top_k_index.flatten().sort(stable=True)
        counts_E = torch.bincount(expert_N, minlength=num_experts).tolist()
        x_ND = hidden_states[order_N // num_choices]
        outs_ND = []
        experts = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), torch.split(x_ND, counts_E), strict=True)
        for gate_up_2FD, down_DF, own_ND in experts:
            if len(own_ND):
                outs_ND.append(F.linear(self._gate(F.linear(own_ND, gate_up_2FD)), down_DF))
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        out_TCD = torch.cat(outs_ND)[place_N].view(num_tokens, num_choices, -1)
        return (out_TCD * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)
