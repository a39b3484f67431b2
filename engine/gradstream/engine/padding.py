"""Runs of tokens of unequal lengths as if each had the most. In host memory, since only CPUs pad.

Legend: A runs, N tokens of the longest, T tokens of all of them, X tokens of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Which token lies in which of A * N places; after a run's last token that one again, so that no run's numbers come into another.

    token_AN: int64 [A * N], the row's token in each place. is_own_AN: bool, False for what pads. token_T, place_T: int64, the row's token
    and the place of each token of the runs, one run after the other. is_whole: these are the row's tokens, in order.
    """

    num_runs: int
    token_AN: Tensor
    is_own_AN: Tensor
    token_T: Tensor
    place_T: Tensor
    is_whole: bool

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int], *, num_tokens: int) -> "Padding":
        """starts: the first token of each run in a row of num_tokens."""
        starts_A1, lengths_A1 = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
        at_N = torch.arange(max(lengths))
        token_AN = (starts_A1 + at_N.minimum(lengths_A1 - 1)).flatten()
        is_own_AN = (at_N < lengths_A1).flatten()
        place_T = is_own_AN.nonzero()[:, 0]
        token_T = token_AN[place_T]
        return cls(
            num_runs=len(starts),
            token_AN=token_AN,
            is_own_AN=is_own_AN,
            token_T=token_T,
            place_T=place_T,
            is_whole=torch.equal(token_T, torch.arange(num_tokens)),
        )

    def spread(self, x_X: Tensor) -> Tensor:
        """x [X, ...] -> [A, N, ...]."""
        return x_X.index_select(0, self.token_AN).view(self.num_runs, -1, *x_X.shape[1:])

    def collect(self, x_AN: Tensor) -> Tensor:
        """x [A, N, ...] -> [T, ...]."""
        return x_AN.flatten(0, 1).index_select(0, self.place_T)


class Spread(torch.autograd.Function):
    """`Padding.spread` for what gets no gradient where it pads."""

    @staticmethod
    def forward(ctx: Any, x_X: Tensor, padding: Padding) -> Tensor:  # noqa: ANN401 (torch makes it)
        ctx.padding, ctx.num_tokens = padding, len(x_X)
        return padding.spread(x_X)

    @staticmethod
    def backward(ctx: Any, grad_AN: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 (torch makes ctx)
        padding: Padding = ctx.padding
        grad_T = padding.collect(grad_AN)
        if padding.is_whole:
            return grad_T, None
        grad_X = grad_T.new_zeros(ctx.num_tokens, *grad_T.shape[1:])
        return grad_X.index_copy_(0, padding.token_T, grad_T), None


class Collect(torch.autograd.Function):
    """`Padding.collect`, of what lies in a row of the runs alone; what pads gets a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, x_AN: Tensor, padding: Padding) -> Tensor:  # noqa: ANN401 (torch makes it)
        ctx.padding, ctx.shape = padding, x_AN.shape
        return padding.collect(x_AN)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 (torch makes ctx)
        padding: Padding = ctx.padding
        grad_AN = grad_T.new_zeros(padding.token_AN.shape[0], *grad_T.shape[1:])
        return grad_AN.index_copy_(0, padding.place_T, grad_T).view(ctx.shape), None
