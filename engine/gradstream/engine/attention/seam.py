"""Our attention function in transformers' registry, which finds the pass's context among the keyword arguments.

Legend: T tokens of the row, H query heads, G key heads, K head size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gradstream.engine.attention.context import AttentionContext

CONTEXT_KEYWORD = "gradstream_attention"

_Attention = Callable[..., tuple[Tensor, None]]

# Arguments by which a model asks for something that plain causal attention is not.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "sinks")


def implementation(*, casts_bf16: bool = False, is_compiled: bool = False) -> str:
    """The name under which transformers finds our attention; it is made known to transformers. Idempotent.

    casts_bf16: queries and keys are rounded to bfloat16 first. is_compiled: the layers around it are compiled, and it is not.
    """
    run: _Attention = _rounded_attention if casts_bf16 else _attention
    if is_compiled:
        run = torch.compiler.disable(partial(_contiguous, run))  # type: ignore[no-untyped-call]  # torch's
    name = f"gradstream{'_bf16' if casts_bf16 else ''}{'_compiled' if is_compiled else ''}"
    # Without a mask function of that name transformers builds no mask, for which it would look at the positions: the context has the bounds.
    AttentionInterface.register(name, run)
    return name


def _attention(  # noqa: PLR0913, PLR0917 (the signature is transformers')
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """query [1, H, T, K] -> out [1, T, H, K]."""
    context: AttentionContext = kwargs[CONTEXT_KEYWORD]  # type: ignore[assignment]  # transformers passes it through as it came
    assert attention_mask is None
    assert not dropout
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    assert not asked, f"{type(module).__name__} asks its attention for {asked}"
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return context.attend(layer, query[0], key[0], value[0], scaling=scale)[None], None


def _rounded_attention(
    module: nn.Module, query: Tensor, key: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, None]:
    """The same for queries and keys whose values are those of bfloat16; their dtype stays."""
    rounded = (heads.to(torch.bfloat16).to(heads.dtype) for heads in (query, key))
    return _attention(module, *rounded, *args, **kwargs)  # type: ignore[arg-type]  # as transformers gave them


def _contiguous(run: _Attention, *args: object, **kwargs: object) -> tuple[Tensor, None]:
    """One memory layout whatever the segments are, for which the code behind it is compiled once."""
    out, _ = run(*args, **kwargs)
    return out.contiguous(), None
