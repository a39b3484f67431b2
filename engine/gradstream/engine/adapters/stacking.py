"""Which slices of a row are computed together.

A pure function of the plan, the adapters' shapes and the machine, which the fingerprint names; so a replay computes the same together.
Batched products need equally many tokens of each adapter and always pay. Grouped products take any numbers of tokens: on GPUs they are
one kernel; on CPUs they are a loop, and what an adapter has less than another one is padded for a batched product instead.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

from gradstream.engine.adapters.factors import Factors
from gradstream.engine.adapters.layout import SiteKind
from gradstream.engine.adapters.slices import AdapterSlice

# Fewest adapters of a batched or grouped product.
_FEWEST = 3
# Of a padded product: the most that it may have of what there is to compute, in tokens; and the tokens that any adapter counts as, since
# fewer take as long.
_MOST_PADDED = 1.5
_LEAST_TOKENS = 16
# An adapter's mean number of tokens, times the features of its widest layer, above which padded products are no faster than one for each.
_MOST_TOKEN_FEATURES = 1 << 15
# What the copies of the weights that lie side by side may take.
_MOST_BYTES = 256 << 20
# Rows of what goes into a grouped product take a multiple of this.
_ALIGN_BYTES = 16


def together(slices: Sequence[AdapterSlice], *, compute_dtype: torch.dtype) -> list[list[AdapterSlice]]:
    """The slices with weights in order, in groups: one alone, or several that can be a stack."""
    return [group for run in _runs(slices) for group in _groups(run, compute_dtype)]


def _runs(slices: Sequence[AdapterSlice]) -> Iterator[list[AdapterSlice]]:
    """Neighbours whose adapters have the same shape."""
    run: list[AdapterSlice] = []
    for part in slices:
        if part.weights is None:
            continue
        if run and not _fit(run[-1], part):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _fit(one: AdapterSlice, other: AdapterSlice) -> bool:
    """True when other goes on where one ends, with an adapter of the same shape."""
    if one.end != other.start or (one.grad is None) != (other.grad is None):
        return False
    mine, others = one.factors, other.factors
    return mine.frozen_rank == others.frozen_rank and mine.layout.digest == others.layout.digest


def _groups(run: list[AdapterSlice], compute_dtype: torch.dtype) -> Iterator[list[AdapterSlice]]:
    if len(run) < _FEWEST or _stack_bytes(run, compute_dtype) > _MOST_BYTES:
        yield from ([part] for part in run)
    elif _grouped_on_gpu(run, compute_dtype):
        yield run
    else:
        is_padded = run[0].factors.weights.device.type == "cpu" and compute_dtype == torch.float32
        for group in _padded(run) if is_padded else _equal(run):
            if len(group) < _FEWEST:
                yield from ([part] for part in group)
            else:
                yield group


def _padded(run: list[AdapterSlice]) -> Iterator[list[AdapterSlice]]:
    """Neighbours for a padded product each; where that would not pay, those of equally many tokens, which need none."""
    for group in _alike(run):
        if _is_long(group):
            yield from _equal(group)
        else:
            yield group


def _is_long(group: list[AdapterSlice]) -> bool:
    """True where padding would not pay."""
    counts = [part.num_tokens for part in group]
    if min(counts) == max(counts):
        return False
    sites = [site for site in group[0].factors.layout.sites if site.kind is SiteKind.LINEAR]
    widest = max((max(site.in_features, site.out_features) for site in sites), default=0)
    return sum(counts) * widest > _MOST_TOKEN_FEATURES * len(counts)


def _equal(run: list[AdapterSlice]) -> Iterator[list[AdapterSlice]]:
    """Neighbours of equally many tokens."""
    for _, same in groupby(run, key=lambda part: part.num_tokens):
        yield list(same)


def _alike(run: list[AdapterSlice]) -> Iterator[list[AdapterSlice]]:
    """Neighbours whose numbers of tokens are near enough for a padded product; each group takes what it can, from the first one on."""
    group: list[AdapterSlice] = []
    most = total = 0
    for part in run:
        counts_as = max(part.num_tokens, _LEAST_TOKENS)
        most, total = max(most, counts_as), total + counts_as
        if group and most * (len(group) + 1) > _MOST_PADDED * total:
            yield group
            group, most, total = [], counts_as, counts_as
        group.append(part)
    yield group


def _grouped_on_gpu(run: list[AdapterSlice], compute_dtype: torch.dtype) -> bool:
    """False also where a batched product does, which takes any size."""
    factors = run[0].factors
    is_equal = len({part.num_tokens for part in run}) == 1
    if is_equal or not factors.weights.is_cuda or compute_dtype != torch.bfloat16:
        return False
    return _can_group(factors, compute_dtype) and torch.cuda.get_device_capability(factors.weights.device) >= (8, 0)


def _can_group(factors: Factors, dtype: torch.dtype) -> bool:
    """True when this torch has the product, and takes these sizes."""
    sizes = [size for site in factors.layout.sites for size in (site.in_features, site.out_features)]
    sizes += [factors.layout.rank, factors.frozen_rank]
    return hasattr(F, "grouped_mm") and all(size * dtype.itemsize % _ALIGN_BYTES == 0 for size in sizes)


def _stack_bytes(run: list[AdapterSlice], compute_dtype: torch.dtype) -> int:
    return len(run) * run[0].factors.weights.numel() * compute_dtype.itemsize
