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
    if not _is_finite(grad, None if is_shared else model.grad):
        what = "accumulated gradient" if _is_finite(grad, None) else "gradient"
        raise NonFinite(f"the {what} of model {model.model_id} holds nan or inf; nothing was accumulated")
    if not is_shared:
        model.grad.add_(grad)
    model.has_grad = True
    model.valid_tokens += num_valid


def _is_finite(grad: Tensor, base: Tensor | None) -> bool:
    """True when grad, or its sum with base, holds neither nan nor inf. One look at the device."""
    verdicts = []
    for start in range(0, grad.numel(), _CHUNK):
        part = grad[start : start + _CHUNK]
        total = part if base is None else part + base[start : start + _CHUNK]
        verdicts.append(total.isfinite().all())
    return bool(torch.stack(verdicts).all())
