"""Where the sequences of a packed row lie.

Legend: T tokens of the row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradstream.engine.padding import Padding
from gradstream.engine.transfer import to_device

# Queries that are masked at a time where there are keys before them: what lies after the last of them is not computed.
MASK_ROWS = 256
# On CPUs: the pairs of tokens, times query heads times their size, that take as long as a call with what is around it.
_CALL_WORK = 250_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentGroup:
    """Segments that are computed together: all of one length that continue the same one, or, with padding, some of a few lengths.

    length: the most tokens of one. start: where the first one lies in the row. index_T: int64, the row's token for each of theirs, segment
    after segment; None with padding, and where they lie side by side. context: the tokens [start, end) of what they continue, from its
    beginning; empty where they continue nothing.
    """

    length: int
    num_segments: int
    start: int
    index_T: Tensor | None
    context: tuple[tuple[int, int], ...]
    padding: Padding | None = None

    @property
    def num_context(self) -> int:
        return sum(end - start for start, end in self.context)


@dataclass(frozen=True, slots=True)
class Grouping:
    """All segments of a row. ungroup: int64 [T], for each row position its place in the concatenated groups; None when they are the same."""

    groups: list[SegmentGroup]
    ungroup: Tensor | None


class Segments:
    """Sequences that lie end to end in one row; a token attends to itself and to earlier tokens of its own segment only.

    A segment may continue an earlier one, its parent, as several may: its tokens also see all of that one and of what it continues.
    """

    def __init__(self, lengths: list[int], *, device: torch.device, parents: list[int] | None = None) -> None:
        """parents: the number of each segment's parent, -1 for none; None where none has one."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths {lengths} must be one or more positive counts")
        self.parents = [-1] * len(lengths) if parents is None else parents
        if len(self.parents) != len(lengths) or any(not -1 <= own < at for at, own in enumerate(self.parents)):
            raise ValueError(f"parents {parents} must name an earlier segment, or -1, for each of {len(lengths)}")
        self.lengths = lengths
        self.device = device
        self.num_tokens = sum(lengths)
        self._groupings: dict[int, Grouping] = {}

    @cached_property
    def starts(self) -> list[int]:
        """First token of each segment."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [end - length for end, length in zip(ends, self.lengths, strict=True)]

    @property
    def is_shared(self) -> bool:
        """True if a segment continues another."""
        return max(self.parents) >= 0

    @cached_property
    def contexts(self) -> list[tuple[tuple[int, int], ...]]:
        """For each segment the tokens [start, end) of its ancestors, the first one first."""
        contexts: list[tuple[tuple[int, int], ...]] = []
        for parent in self.parents:
            if parent < 0:
                contexts.append(())
            else:
                start = self.starts[parent]
                contexts.append((*contexts[parent], (start, start + self.lengths[parent])))
        return contexts

    @cached_property
    def key_lengths(self) -> list[int]:
        """Tokens that each segment's last token sees."""
        return [
            length + sum(end - start for start, end in context)
            for length, context in zip(self.lengths, self.contexts, strict=True)
        ]

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: each token's position within its sequence, ancestors included."""
        parts = zip(self.key_lengths, self.lengths, strict=True)
        return to_device(torch.cat([torch.arange(end - length, end) for end, length in parts]), self.device)

    @cached_property
    def key_offsets(self) -> Tensor:
        """int32 [segments + 1]: cumulative ends of key_lengths, starting with 0."""
        return to_device(_cumulative(self.key_lengths), self.device)

    @cached_property
    def key_index(self) -> Tensor | None:
        """int64 [sum of key_lengths]: what each segment sees, its ancestors and then itself; None where that is the row itself."""
        if not self.is_shared:
            return None
        own = zip(self.contexts, self.starts, self.lengths, strict=True)
        ranges = [part for context, start, length in own for part in (*context, (start, start + length))]
        return to_device(torch.cat([torch.arange(start, end) for start, end in ranges]), self.device)

    @cached_property
    def sees(self) -> Tensor:
        """bool [segments, segments]: which whole segments, not itself, a segment's tokens see."""
        sees = torch.zeros(len(self.lengths), len(self.lengths), dtype=torch.bool)
        for number, parent in enumerate(self.parents):
            if parent >= 0:
                sees[number] = sees[parent]
                sees[number, parent] = True
        return to_device(sees, self.device)

    def causal_mask(self, num_queries: int, num_keys: int) -> Tensor:
        """bool [num_queries, num_keys] of the last tokens of a sequence: which keys each of them sees.

        A view of one mask for all of the row; num_queries at most MASK_ROWS.
        """
        rows = self._mask_rows
        before = self._mask.shape[1] - rows - (num_keys - num_queries)
        return self._mask[:num_queries, before : before + num_keys]

    @cached_property
    def _mask_rows(self) -> int:
        return min(MASK_ROWS, max(self.lengths))

    @cached_property
    def _mask(self) -> Tensor:
        most = max(self.key_lengths)
        is_seen = torch.ones(self._mask_rows, most + self._mask_rows, dtype=torch.bool, device=self.device)
        return is_seen.tril(most)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [segments + 1]: cumulative ends, starting with 0."""
        return to_device(_cumulative(self.lengths), self.device)

    @cached_property
    def ids(self) -> Tensor:
        """int64 [T]: the number of each token's segment."""
        ids = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return to_device(ids, self.device)

    def grouping(self, num_features: int) -> Grouping:
        """num_features: of a token's queries in all heads."""
        if num_features not in self._groupings:
            self._groupings[num_features] = self._grouped(num_features)
        return self._groupings[num_features]

    def _grouped(self, num_features: int) -> Grouping:
        """One group per distinct length and parent, in order of first appearance; on CPUs what is worth padding first, as one."""
        by_length: dict[_Kind, list[int]] = {}
        for number, (length, context) in enumerate(zip(self.lengths, self.contexts, strict=True)):
            by_length.setdefault((length, context), []).append(number)
        groups, order = [], []
        for run in _padded(by_length, num_features) if self.device.type == "cpu" else []:
            padded = sorted(number for kind in run for number in by_length.pop(kind))
            groups.append(self._group(padded))
            order += padded
        for numbers in by_length.values():
            groups.append(self._group(numbers))
            order += numbers
        if order == sorted(order):
            return Grouping(groups, None)
        inverse_T = torch.cat(
            [torch.arange(self.starts[number], self.starts[number] + self.lengths[number]) for number in order]
        )
        return Grouping(groups, to_device(inverse_T.argsort(), self.device))

    def _group(self, numbers: list[int]) -> SegmentGroup:
        starts, lengths = [self.starts[number] for number in numbers], [self.lengths[number] for number in numbers]
        length = max(lengths)
        padding = index_T = None
        if min(lengths) < length:
            padding = Padding.of(starts, lengths, num_tokens=self.num_tokens)
        elif starts[-1] - starts[0] != length * (len(starts) - 1):
            index_T = to_device(_tokens(starts, length), self.device)
        return SegmentGroup(
            length=length,
            num_segments=len(starts),
            start=starts[0],
            index_T=index_T,
            context=self.contexts[numbers[0]],
            padding=padding,
        )


# A length, and what segments of that length continue.
_Kind = tuple[int, tuple[tuple[int, int], ...]]


def _padded(by_length: dict[_Kind, list[int]], num_features: int) -> list[list[_Kind]]:
    """Which lengths of segments without parents are computed as one, from the shortest on: what is padded takes less than the calls saved."""
    runs: list[list[_Kind]] = []
    counts: list[int] = []
    waste = 0
    for kind in sorted(kind for kind in by_length if not kind[1]):
        if runs:
            longest = runs[-1][-1][0]
            waste += sum(counts) * (kind[0] ** 2 - longest**2) * num_features
        if not runs or waste > len(counts) * _CALL_WORK:
            runs.append([])
            counts, waste = [], 0
        runs[-1].append(kind)
        counts.append(len(by_length[kind]))
    return [run for run in runs if len(run) > 1]


def _tokens(starts: list[int], length: int) -> Tensor:
    """Positions of the tokens of segments of one length, segment after segment, in host memory."""
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
