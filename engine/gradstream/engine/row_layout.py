"""The tokens that a row computes, where several of its datums share some.

Legend: E tokens of the row's datums end to end, T tokens that are computed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradstream.engine.prefixes import Path, Piece


@dataclass(slots=True)
class RowLayout:
    """Segments of computed tokens, job by job, and which datum tokens they stand for.

    lengths and parents: of each segment, the latter the earlier segment that it continues, -1 for none. sources: for each segment the
    first of the E tokens that are its own. bounds: the computed tokens [start, end) of each job of the row. places: of the E tokens in
    order, piece by piece: the first computed token, how many they are, and which of the segment's datums has them. num_slots: the
    most datums of a segment.
    """

    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    bounds: list[tuple[int, int]] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    num_slots: int = 1

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1][1]

    def source_of_computed(self) -> NDArray[np.int64]:
        """[T]: for each computed token one of the E tokens that it stands for."""
        return _ranges(zip(self.sources, self.lengths, strict=True))

    def computed_of_source(self) -> NDArray[np.int64]:
        """[E]: for each of the E tokens the computed one that stands for it."""
        return _ranges((start, size) for start, size, _ in self.places)

    def any_of_computed(self, is_E: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[T]: whether it is true of any of the E tokens that a computed token stands for."""
        is_T = np.zeros(sum(self.lengths), dtype=np.bool_)
        is_T[self.computed_of_source()[is_E]] = True
        return is_T

    def slots(self) -> NDArray[np.int64]:
        """[E]: tells apart those of the E tokens that have one computed token."""
        return np.repeat([slot for _, _, slot in self.places], [size for _, size, _ in self.places])


def lay_out(jobs: Iterable[Sequence[tuple[int, Path]]]) -> RowLayout | None:
    """The layout of a row from its datums, job by job: the number of a datum's bundle, and its pieces.

    Only datums of one bundle share tokens. None where no two of them do.
    """
    layout = RowLayout()
    source = 0
    for datums in jobs:
        _add_job(layout, datums, source)
        source += sum(path[-1].end for _, path in datums)
    return layout if layout.num_slots > 1 else None


# A bundle and one of its nodes.
_Node = tuple[int, int]


def _add_job(layout: RowLayout, datums: Sequence[tuple[int, Path]], source: int) -> None:
    """source: where the job's datums begin among the E tokens."""
    begin = start = layout.bounds[-1][1] if layout.bounds else 0
    counts = Counter((number, piece.node) for number, path in datums for piece in path)
    segments: dict[_Node, tuple[int, int]] = {}  # the number and the first computed token of each node's segment
    seen: Counter[_Node] = Counter()
    for number, path in datums:
        parent = -1
        for piece in _joined(number, path, counts):
            node, size = (number, piece.node), piece.end - piece.start
            if node not in segments:
                segments[node] = (len(layout.lengths), start)
                layout.lengths.append(size)
                layout.parents.append(parent)
                layout.sources.append(source + piece.start)
                start += size
            parent, first = segments[node]
            layout.places.append((first, size, seen[node]))
            seen[node] += 1
        source += path[-1].end
    layout.bounds.append((begin, start))
    layout.num_slots = max(layout.num_slots, *seen.values())


def _joined(number: int, path: Path, counts: Counter[_Node]) -> list[Piece]:
    """The path, with those pieces in one that the same datums of the bundle have."""
    joined: list[Piece] = []
    for piece in path:
        # Whoever has a piece has those before it, so equal counts are the same datums.
        if joined and counts[number, joined[-1].node] == counts[number, piece.node]:
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return joined


def _ranges(parts: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """first, first + 1, ... of each (first, size), end to end."""
    return np.concatenate([np.arange(first, first + size, dtype=np.int64) for first, size in parts])
