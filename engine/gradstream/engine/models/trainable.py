"""A transformers model made ready for the training of its own weights."""

from torch import nn

from gradstream.engine.models.flat import FlatParameters
from gradstream.engine.models.full_experts import FullExperts
from gradstream.engine.models.full_linear import FullLinear
from gradstream.engine.models.fused import replace
from gradstream.engine.models.sites import check_experts
from gradstream.engine.products import library
from gradstream.shared.errors import Unsupported


def train_fully(causal_lm: nn.Module, *, freeze_router: bool, is_grouped: bool = False) -> FlatParameters:
    """Make the model's parameters trainable views into one flat tensor, on the device where they are.

    freeze_router: the weights that choose experts stay as they are. is_grouped: experts go through torch's grouped product. Raises
    Unsupported for experts or an unembedding of another kind.
    """
    head = causal_lm.get_submodule("lm_head")
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise Unsupported(f"model: {type(causal_lm).__name__}: lm_head must be a linear layer without bias")
    has_own_products = library(head.weight.device, head.weight.dtype) == "onednn"
    for path, module in list(causal_lm.named_modules()):
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            check_experts(module, path)
            replace(causal_lm, path, FullExperts(module, is_grouped=is_grouped))
        elif has_own_products and isinstance(module, nn.Linear) and module is not head:
            parameters = dict(module.named_parameters())
            replace(causal_lm, path, FullLinear(parameters["weight"], parameters.get("bias")))
    return FlatParameters(causal_lm, device=head.weight.device, freeze_router=freeze_router)
