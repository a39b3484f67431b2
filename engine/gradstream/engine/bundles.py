"""Datums of a job that have tokens in common, put together for one row; pure functions of their pieces."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradstream.engine.prefixes import Path

# A shared token is evaluated once for each of its datums, side by side, and a whole row is as wide as its widest token. These bound how many
# datums a token has, and how many candidates of theirs: 16 bytes each, 64 MiB in a row of 8,192 tokens.
MAX_DATUMS = 64
MAX_COLUMNS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A datum of a job, both counted in submission order."""

    job: int
    datum: int
    length: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """Datums that go into a row together. num_tokens: how many are computed for them."""

    placements: tuple[Placement, ...]
    num_tokens: int


def most_datums(num_candidates: int) -> int:
    """How many datums may share a token in rows where tokens have up to so many candidates."""
    return max(2, min(MAX_DATUMS, MAX_COLUMNS // num_candidates))


def bundle(job: int, paths: Sequence[Path], budget: int, *, max_datums: int = MAX_DATUMS) -> list[Bundle]:
    """A job's datums, those with a common prefix together as far as the budget and max_datums reach, by their first datums.

    Where a prefix has more datums than that, those with the longest prefixes in common stay together.
    """
    firsts: dict[int, int] = {}
    for datum, path in enumerate(paths):
        for piece in path:
            firsts.setdefault(piece.node, datum)
    families: dict[int, list[int]] = {}
    for datum, path in enumerate(paths):
        families.setdefault(path[0].node, []).append(datum)
    bundles: list[Bundle] = []
    for family in families.values():
        family.sort(key=lambda datum: [firsts[piece.node] for piece in paths[datum]])
        bundles += _cut(job, family, paths, budget, max_datums=max_datums)
    return sorted(bundles, key=lambda part: part.placements[0].datum)


def _cut(job: int, family: Sequence[int], paths: Sequence[Path], budget: int, *, max_datums: int) -> Iterator[Bundle]:
    own: list[Placement] = []
    nodes: set[int] = set()
    used = 0
    for datum in family:
        path = paths[datum]
        more = sum(piece.end - piece.start for piece in path if piece.node not in nodes)
        if own and (used + more > budget or len(own) == max_datums):
            yield Bundle(tuple(own), used)
            own, nodes, used = [], set(), 0
            more = path[-1].end
        own.append(Placement(job=job, datum=datum, length=path[-1].end))
        nodes.update(piece.node for piece in path)
        used += more
    yield Bundle(tuple(own), used)


def num_computed(paths: Sequence[Path]) -> int:
    """The tokens of all datums, each shared one once."""
    return sum({piece.node: piece.end - piece.start for path in paths for piece in path}.values())


def num_shared(paths: Sequence[Path]) -> int:
    """The longest prefix that datums share."""
    counts = Counter(piece.node for path in paths for piece in path)
    return max((piece.end for path in paths for piece in path if counts[piece.node] > 1), default=0)
