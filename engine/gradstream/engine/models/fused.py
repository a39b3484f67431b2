"""Norms, gates and rotary embeddings as one kernel each, in the place of transformers' series of operations.

Legend: T tokens, D features, F hidden features of an MLP, H query heads, G key heads, K head size.
"""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from gradstream.engine.models.compiled import compiled
from gradstream.shared.errors import Unsupported

_ROTARY = "apply_rotary_pos_emb"

# (q, k, cos, sin, unsqueeze_dim) -> q and k turned; the signature is that of transformers.
Rotary = Callable[..., tuple[Tensor, Tensor]]
Gate = Callable[[Tensor, Tensor], Tensor]


class FusedRMSNorm(nn.Module):
    """torch's own RMS norm: in float32 with the weight multiplied before the one rounding, where transformers rounds twice."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with the middle as one kernel. The linear layers keep their names."""

    def __init__(self, base: nn.Module, gate: Gate) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, base.get_submodule(name))
        self.act_fn = base.act_fn
        self._gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate_TF, up_TF = (self.get_submodule(name)(x) for name in ("gate_proj", "up_proj"))
        out: Tensor = self.get_submodule("down_proj")(self._gate(gate_TF, up_TF))
        return out


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in at least float32 and rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q [1, H, T, K] and k [1, G, T, K] turned by cos and sin [1, T, K], in at least float32 and rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.unsqueeze(unsqueeze_dim).to(wide), sin.unsqueeze(unsqueeze_dim).to(wide)

    def turned(x: Tensor) -> Tensor:
        first, second = x.to(wide).chunk(2, dim=-1)
        return (x.to(wide) * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return turned(q), turned(k)


def fuse_norms(causal_lm: nn.Module) -> int:
    """Exchange the model's RMS norms; returns how many there were."""
    found = [
        (path, module)
        for path, module in causal_lm.named_modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    ]
    for path, module in found:
        replace(causal_lm, path, FusedRMSNorm(cast("nn.Parameter", module.weight), float(module.variance_epsilon)))
    return len(found)


def fuse_gates(causal_lm: nn.Module, gate: Gate | None = None) -> int:
    """Exchange the gates of the model's MLPs and experts; returns how many there were. gate: silu_gate as one kernel."""
    one_kernel = compiled(silu_gate) if gate is None else gate
    count = 0
    for path, module in list(causal_lm.named_modules()):
        if not isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation):
            continue
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
            replace(causal_lm, path, GatedMLP(module, one_kernel))
            count += 1
        elif hasattr(module, "_apply_gate"):
            module._apply_gate = _split_gate(one_kernel)  # noqa: SLF001 (transformers' hook of experts)
            count += 1
    return count


def _split_gate(gate: Gate) -> Callable[[Tensor], Tensor]:
    """gate on the two halves [gate, up] of the last dimension, as the experts of transformers have them."""

    def halves(gate_up: Tensor) -> Tensor:
        return gate(*gate_up.chunk(2, dim=-1))

    return halves


def fuse_rotary(causal_lm: nn.Module, rotary: Rotary | None = None) -> int:
    """Make the attention layers turn q and k by one kernel; returns how many there were. rotary: `rotate` as one kernel.

    The forward method of an attention layer finds the rotary function among its module's globals. Each layer gets the same code with
    that one global exchanged, so models of the family elsewhere in this process are left alone. Raises Unsupported for a forward
    method whose globals cannot be exchanged.
    """
    one_kernel = compiled(rotate) if rotary is None else rotary
    count = 0
    for module in causal_lm.modules():
        code = type(module).forward
        if not isinstance(code, FunctionType) or _ROTARY not in code.__code__.co_names:
            continue
        if code.__closure__ is not None:
            raise Unsupported(f"rope_native: {type(module).__name__} hides its rotary embedding; use true")
        names = {**code.__globals__, _ROTARY: one_kernel}
        bound = FunctionType(code.__code__, names, code.__name__, code.__defaults__)
        bound.__kwdefaults__ = code.__kwdefaults__
        module.forward = MethodType(bound, module)
        count += 1
    return count


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put module at path."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
