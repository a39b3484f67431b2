"""Whether numbers are finite, also once they are rounded to what a model computes in."""

import torch
from torch import Tensor

# Numbers that are looked at together: what a look allocates stays small beside a model.
_CHUNK = 1 << 24


@torch.no_grad()
def fits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool tensor: true if no number is nan or inf, neither as it is nor rounded to dtype, which may hold less."""
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    # Extremes are nan where a number is, and rounding keeps the order: looking at all numbers takes eight times as long on a CPU.
    extremes = torch.stack([end for part in torch.split(values.flatten(), _CHUNK) for end in torch.aminmax(part)])
    is_rounded = extremes.is_floating_point() and dtype.itemsize < extremes.element_size()
    return (extremes.to(dtype) if is_rounded else extremes).isfinite().all()
