"""The numerics of a config, put into a transformers model that was just loaded."""

import torch
from torch import nn

from gradstream.engine.config import Numerics
from gradstream.engine.models.compiled import require_compiler
from gradstream.engine.models.fused import fuse_gates, fuse_norms, fuse_rotary
from gradstream.engine.models.routers import compute_in_float32
from gradstream.shared.errors import Unsupported


def exchange_functions(causal_lm: nn.Module, numerics: Numerics) -> None:
    """Put fused norms, gates and rotary embeddings and float32 routers in the place of the model's own, where numerics says so.

    Parameters keep their names. With enable_compile the gates and rotary embeddings are fused by the compilation of the layers.
    Raises Unsupported when the model has nothing to exchange, or when a kernel cannot be made here.
    """
    weight = causal_lm.get_parameter("lm_head.weight")
    if not numerics.rmsnorm_native and fuse_norms(causal_lm) == 0:
        raise _nothing(causal_lm, "rmsnorm_native", "RMS norms")
    if not numerics.activation_native and not numerics.enable_compile:
        require_compiler(weight.device, asked="activation_native: false", instead="true")
        if fuse_gates(causal_lm) == 0:
            raise _nothing(causal_lm, "activation_native", "SiLU gates")
    if not numerics.rope_native and not numerics.enable_compile:
        require_compiler(weight.device, asked="rope_native: false", instead="true")
        if fuse_rotary(causal_lm) == 0:
            raise _nothing(causal_lm, "rope_native", "rotary embeddings")
    is_narrow = weight.dtype in {torch.bfloat16, torch.float16}
    if numerics.router_fp32 and is_narrow and has_experts(causal_lm) and compute_in_float32(causal_lm) == 0:
        raise Unsupported(
            f"router_fp32: {type(causal_lm).__name__} has no routers that can be told to use float32; use false"
        )


def has_experts(causal_lm: nn.Module) -> bool:
    """True for a mixture of experts."""
    return any(isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) for module in causal_lm.modules())


def is_grouped(causal_lm: nn.Module, numerics: Numerics) -> bool:
    """Whether experts go through torch's grouped product: asked for, or the best that runs on this device.

    Raises Unsupported when it was asked for and cannot run.
    """
    if numerics.moe_implementation == "eager" or not has_experts(causal_lm):
        return False
    refusal = _grouped_refusal(causal_lm.get_parameter("lm_head.weight"))
    if numerics.moe_implementation == "native" and refusal is not None:
        raise Unsupported(f"moe_implementation: native {refusal}; use eager")
    # On CPUs the grouped product is a loop as well.
    is_cuda = causal_lm.get_parameter("lm_head.weight").is_cuda
    return refusal is None and (is_cuda or numerics.moe_implementation == "native")


def _grouped_refusal(weight: torch.Tensor) -> str | None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"needs a torch with grouped_mm, and this is {torch.__version__}"
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        return f"needs bfloat16 on a GPU, and the model computes in {weight.dtype}"
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    if weight.dtype == torch.float64:
        return "does not compute in float64"
    return None


def _nothing(causal_lm: nn.Module, field: str, what: str) -> Unsupported:
    return Unsupported(f"{field}: {type(causal_lm).__name__} has no {what} that this engine can fuse; use true")
