"""Where each parameter of an adapter lies in its flat tensors.

Legend: R rank, I in features, O out features, E experts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gradstream.engine.trained import ParamTensor
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import LoraSpec


class SiteKind(StrEnum):
    """linear: one weight [O, I]. experts: a fused weight [E, O, I]. head: the unembedding [V, D]."""

    LINEAR = "linear"
    EXPERTS = "experts"
    HEAD = "head"


class SiteGroup(StrEnum):
    """The client's switches: train_attn, train_mlp, train_unembed."""

    ATTN = "attn"
    MLP = "mlp"
    UNEMBED = "unembed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One weight of the base model that an adapter can change.

    index: its place among all sites of the model. name: the path of the weight in the Hugging Face model, without `.weight`.
    num_experts is 0 unless kind is experts.
    """

    index: int
    name: str
    kind: SiteKind
    group: SiteGroup
    in_features: int
    out_features: int
    num_experts: int = 0


class LoraPair(NamedTuple):
    """The two factors of one site: a [R, I] and b [O, R], or a [E, R, I] and b [E, O, R]; the change is scale * b @ a."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class AdapterLayout:
    """The sites that an adapter of a rank trains, in the base model's order.

    A flat tensor of this layout holds a and then b of each site, row-major, site after site, without gaps.
    """

    sites: tuple[Site, ...]
    rank: int

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """a's and b's shape of each site, alternating."""
        shapes: list[tuple[int, ...]] = []
        for site in self.sites:
            experts = (site.num_experts,) if site.num_experts else ()
            shapes.append((*experts, self.rank, site.in_features))
            shapes.append((*experts, site.out_features, self.rank))
        return shapes

    @cached_property
    def tensors(self) -> list[ParamTensor]:
        """Each factor, in flat order. Those of the head are no matrices in the sense of muon, which leaves unembeddings alone."""
        names = [(site, f"{site.name}.{factor}") for site in self.sites for factor in "ab"]
        starts = [0, *accumulate(self.sizes)]
        return [
            ParamTensor(name=name, shape=shape, start=start, is_matrix=site.kind is not SiteKind.HEAD)
            for (site, name), shape, start in zip(names, self.shapes, starts[:-1], strict=True)
        ]

    @cached_property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes]

    @cached_property
    def num_params(self) -> int:
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of the names and shapes in order: flat tensors of equal digests mean the same parameters."""
        lines = [f"{tensor.name} {'x'.join(map(str, tensor.shape))}\n" for tensor in self.tensors]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def pairs(self, flat: Tensor) -> dict[int, LoraPair]:
        """Views into a flat tensor [num_params], by site index."""
        views = [part.view(shape) for part, shape in zip(torch.split(flat, self.sizes), self.shapes, strict=True)]
        return {site.index: LoraPair(views[2 * i], views[2 * i + 1]) for i, site in enumerate(self.sites)}

    def named_views(self, flat: Tensor) -> dict[str, LoraPair]:
        """Views into a flat tensor [num_params], by site name."""
        pairs = self.pairs(flat)
        return {site.name: pairs[site.index] for site in self.sites}


def layout_for(base_sites: Sequence[Site], spec: LoraSpec) -> AdapterLayout:
    """The layout that a client's spec asks for.

    Raises InvalidRequest when its switches leave nothing to train, or target_modules names what none of the sites left is.
    """
    groups = {
        SiteGroup.ATTN: spec.train_attn,
        SiteGroup.MLP: spec.train_mlp,
        SiteGroup.UNEMBED: spec.train_unembed,
    }
    sites = tuple(site for site in base_sites if groups[site.group])
    if not sites:
        raise InvalidRequest("lora: train_attn, train_mlp and train_unembed are all false; at least one must be true")
    if spec.target_modules is not None:
        sites = _named(sites, spec.target_modules)
    return AdapterLayout(sites=sites, rank=spec.rank)


def _named(sites: Sequence[Site], names: Sequence[str]) -> tuple[Site, ...]:
    """Those of the sites whose names end in one of names.

    gate_proj and up_proj together also name experts' gate_up_proj, where both are one weight. Raises InvalidRequest for an empty list
    and for a name of no site.
    """
    wanted = set(names)
    if {"gate_proj", "up_proj"} <= wanted:
        wanted.add("gate_up_proj")
    chosen = tuple(site for site in sites if _last(site) in wanted)
    offered = {_last(site) for site in sites}
    fused = {"gate_proj", "up_proj"} if "gate_up_proj" in offered and "gate_up_proj" in wanted else set()
    unknown = sorted(set(names) - offered - fused)
    if unknown or not chosen:
        raise InvalidRequest(
            f"lora.target_modules: {', '.join(unknown) or 'empty'}; modules that can have an adapter here are "
            f"{', '.join(sorted(offered))}"
        )
    return chosen


def _last(site: Site) -> str:
    return site.name.rpartition(".")[2]
