"""Where the sequences of a packed row lie.

Legend: T tokens of the row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualLengths:
    """All segments of one length. index_T: their token positions in the row, segment after segment."""

    length: int
    num_segments: int
    start: int
    is_contiguous: bool
    index_T: Tensor


class Segments:
    """Sequences that lie end to end in one row; a token attends to itself and to earlier tokens of its own segment only."""

    def __init__(self, lengths: list[int], *, device: torch.device) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths {lengths} must be one or more positive counts")
        self.lengths = lengths
        self.device = device
        self.num_tokens = sum(lengths)

    @cached_property
    def starts(self) -> list[int]:
        """First token of each segment."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [end - length for end, length in zip(ends, self.lengths, strict=True)]

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: each token's position within its segment."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [segments + 1]: cumulative ends, starting with 0."""
        lengths = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return lengths.cumsum(0, dtype=torch.int32).to(self.device)

    @cached_property
    def ids(self) -> Tensor:
        """int64 [T]: the number of each token's segment."""
        ids = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return ids.to(self.device)

    @cached_property
    def groups(self) -> list[EqualLengths]:
        """One entry per distinct length, in order of first appearance."""
        by_length: dict[int, list[int]] = {}
        for start, length in zip(self.starts, self.lengths, strict=True):
            by_length.setdefault(length, []).append(start)
        groups = []
        for length, starts in by_length.items():
            index_T = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
            groups.append(
                EqualLengths(
                    length=length,
                    num_segments=len(starts),
                    start=starts[0],
                    is_contiguous=starts[-1] - starts[0] == length * (len(starts) - 1),
                    index_T=index_T.to(self.device),
                )
            )
        return groups

    @cached_property
    def ungroup(self) -> Tensor | None:
        """int64 [T]: for each row position its place in the concatenated groups; None when they are the same."""
        order_T = torch.cat([group.index_T for group in self.groups])
        inverse_T = torch.empty_like(order_T)
        inverse_T[order_T] = torch.arange(self.num_tokens, device=self.device)
        is_identity = bool((inverse_T == torch.arange(self.num_tokens, device=self.device)).all())
        return None if is_identity else inverse_T
