"""Gradients added to a model's accumulator, or refused as a whole.

Legend: P parameters of a model.
"""

import torch
from torch import Tensor

from gradstream.engine.trained import TrainedModel
from gradstream.shared.errors import NonFinite

# Values that are looked at together: what a check allocates stays small beside a model.
_CHUNK = 1 << 24


@torch.no_grad()
def accumulate(model: TrainedModel, grad: Tensor, *, num_valid: int) -> None:
    """Add a job's gradient, flat fp32 [P]; it may be model.grad itself, where nothing was accumulated before.

    num_valid: the job's tokens with a target. Raises NonFinite, with the model as it was (but for such a shared grad), when a sum
    would not be finite.
    """
    is_shared = grad is model.grad
    for own, added in zip(torch.split(model.grad, _CHUNK), torch.split(grad, _CHUNK), strict=True):
        if not bool((own if is_shared else own + added).isfinite().all()):
            what = "gradient" if not bool(added.isfinite().all()) else "accumulated gradient"
            raise NonFinite(f"the {what} of model {model.model_id} holds nan or inf; nothing was accumulated")
    if not is_shared:
        model.grad.add_(grad)
    model.has_grad = True
    model.valid_tokens += num_valid
