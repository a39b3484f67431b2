"""Which adapter serves which tokens in one forward (and backward) pass.

Legend: A adapters, T tokens of the row, P parameters of an adapter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.adapters.layout import AdapterLayout, LoraPair
from gradstream.engine.adapters.slices import AdapterSlice, Patch
from gradstream.engine.adapters.stacked import StackedPatch, side_by_side
from gradstream.engine.adapters.stacking import together
from gradstream.engine.padding import Padding
from gradstream.engine.transfer import to_device


class AdapterPass:
    """The slices of one row. Slices are disjoint and in order; tokens outside all of them run on the bare base model."""

    def __init__(self, slices: Sequence[AdapterSlice], *, compute_dtype: torch.dtype, is_stacked: bool = True) -> None:
        """is_stacked: neighbours of one shape are computed together, where that pays."""
        self.slices = list(slices)
        self.is_training = any(part.grad is not None for part in self.slices)
        # Connects every LoRA function to the graph; the gradients themselves go into the slices' buffers.
        self.anchor = torch.zeros((), requires_grad=True)
        self._groups: list[_Slice | _Stack] = []
        self._singles: list[_Slice] = []
        for group in _grouped(self.slices, compute_dtype, is_stacked=is_stacked):
            stack = _Stack.of(group, compute_dtype) if len(group) > 1 else None
            singles = [_Slice(part, compute_dtype) for part in group] if stack is None else stack.singles
            self._groups += singles if stack is None else [stack]
            self._singles += singles
        self._patches: dict[int, list[Patch]] = {}
        self._grouped_patches: dict[int, list[Patch | StackedPatch]] = {}

    @classmethod
    def inference(
        cls, slices: Sequence[tuple[int, int, LoraWeights | None]], *, compute_dtype: torch.dtype
    ) -> "AdapterPass":
        """A pass that trains nothing, from (start, end, weights), each slice for itself."""
        parts = [AdapterSlice(start=start, end=end, weights=weights) for start, end, weights in slices]
        return cls(parts, compute_dtype=compute_dtype, is_stacked=False)

    def patches(self, site: int) -> list[Patch]:
        """The slices that change a site, in token order."""
        if site not in self._patches:
            self._patches[site] = [single.patch(site) for single in self._singles if single.has(site)]
        return self._patches[site]

    def grouped_patches(self, site: int) -> list[Patch | StackedPatch]:
        """The same, those together that are computed together; of sites with one weight."""
        if site not in self._grouped_patches:
            self._grouped_patches[site] = [group.patch(site) for group in self._groups if group.has(site)]
        return self._grouped_patches[site]


def _grouped(
    slices: Sequence[AdapterSlice], compute_dtype: torch.dtype, *, is_stacked: bool
) -> list[list[AdapterSlice]]:
    if is_stacked:
        return together(slices, compute_dtype=compute_dtype)
    return [[part] for part in slices if part.weights is not None]


class _Slice:
    """One slice in a pass. Views are made for the sites that are asked for."""

    def __init__(self, part: AdapterSlice, compute_dtype: torch.dtype, flat_P: Tensor | None = None) -> None:
        """flat_P: its factors in the compute dtype, where they are there already."""
        self._part = part
        self._layout = part.factors.layout
        self._pairs = part.factors.pairs_in(compute_dtype) if flat_P is None else None
        self._flat_P = flat_P

    def has(self, site: int) -> bool:
        return site in self._layout.tensors_at

    def patch(self, site: int) -> Patch:
        part = self._part
        if self._pairs is not None:
            weight = self._pairs[site]
        else:
            assert self._flat_P is not None
            weight = self._layout.pair(self._flat_P, site)
        grad = None if part.grad is None else part.adapter.layout.pair(part.grad, site)
        return Patch(part.start, part.end, part.adapter.scale, weight, grad, part.factors.frozen_rank)


class _Stack:
    """Slices whose adapters lie side by side, in copies that live as long as the pass."""

    def __init__(self, group: Sequence[AdapterSlice], grads_AP: Tensor | None, compute_dtype: torch.dtype) -> None:
        """grads_AP: a view of the slices' own buffers."""
        self._group = group
        self._layout = group[0].factors.layout
        device = group[0].factors.weights.device
        self._weights_AP = torch.empty(len(group), self._layout.num_params, dtype=compute_dtype, device=device)
        for row_P, part in zip(self._weights_AP, group, strict=True):
            row_P.copy_(part.factors.weights)
        self._grads_AP = grads_AP
        self.singles = [_Slice(part, compute_dtype, row) for part, row in zip(group, self._weights_AP, strict=True)]
        counts = [part.num_tokens for part in group]
        # Not rounded to the compute dtype, as a number that a tensor is multiplied by is not.
        scale_dtype = torch.promote_types(compute_dtype, torch.float32)
        scale_A = torch.tensor([part.adapter.scale for part in group], dtype=scale_dtype)
        self._ends_A: Tensor | None = None
        self._padding: Padding | None = None
        if len(set(counts)) == 1:
            self._scale = to_device(scale_A, device)[:, None, None]
        elif device.type == "cpu":
            starts = [part.start - group[0].start for part in group]
            self._padding = Padding.of(starts, counts, num_tokens=sum(counts))
            self._scale = scale_A[:, None, None] * self._padding.is_own_AN.view(len(counts), -1, 1)
        else:
            counts_A = torch.tensor(counts)
            self._scale = to_device(scale_A.repeat_interleave(counts_A), device)[:, None]
            self._ends_A = to_device(counts_A.cumsum(0).to(torch.int32), device)

    @classmethod
    def of(cls, group: Sequence[AdapterSlice], compute_dtype: torch.dtype) -> "_Stack | None":
        """None when the slices' gradients do not lie side by side."""
        grads = [part.grad for part in group if part.grad is not None]
        grads_AP = side_by_side(grads) if grads else None
        return None if grads and grads_AP is None else cls(group, grads_AP, compute_dtype)

    def has(self, site: int) -> bool:
        return site in self._layout.tensors_at

    def patch(self, site: int) -> StackedPatch:
        first = self._group[0]
        return StackedPatch(
            start=first.start,
            end=self._group[-1].end,
            ends_A=self._ends_A,
            padding=self._padding,
            scale=self._scale,
            weight=_pairs(self._layout, self._weights_AP, site),
            grad=None if self._grads_AP is None else _pairs(first.adapter.layout, self._grads_AP, site),
            frozen_rank=first.factors.frozen_rank,
        )


def _pairs(layout: AdapterLayout, flat_AP: Tensor, site: int) -> LoraPair:
    """Views of each adapter's factors of a site, a [A, R, I] and b [A, O, R]."""
    a, b = layout.tensors_at[site]
    return LoraPair(*(flat_AP[:, one.start : one.stop].view(-1, *one.shape) for one in (a, b)))
