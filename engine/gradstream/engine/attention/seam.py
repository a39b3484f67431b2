"""Our attention function in transformers' registry, which finds the pass's context among the keyword arguments.

Legend: T tokens of the row, H query heads, G key heads, K head size.
"""

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gradstream.engine.attention.context import AttentionContext

IMPLEMENTATION = "gradstream"
CONTEXT_KEYWORD = "gradstream_attention"

# Arguments by which a model asks for something that plain causal attention is not.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "sinks")


def register() -> None:
    """Make IMPLEMENTATION known to transformers. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


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


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """The context knows the boundaries, so transformers builds no mask."""
