"""Whether numbers are finite, also once they are rounded to what a model computes in."""

import torch
from torch import Tensor

# Numbers that are looked at together: what a look allocates stays small beside a model.
_CHUNK = 1 << 24


@torch.no_grad()
def fits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool tensor: true if no number is nan or inf, neither as it is nor rounded to dtype, which may hold less."""
    verdicts = []
    for part in torch.split(values.flatten(), _CHUNK):
        rounded = part.to(dtype) if part.is_floating_point() and dtype.itemsize < part.element_size() else part
        verdicts.append(rounded.isfinite().all())
    return torch.stack(verdicts).all()
