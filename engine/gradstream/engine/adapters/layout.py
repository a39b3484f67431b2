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

import msgspec
import torch
from torch import Tensor

from gradstream.engine.trained import ParamTensor
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import LoraSpec

# As target_modules: every module that the switches allow, whatever the server's default is.
ALL_MODULES = ["all-linear"]
_GATE_AND_UP = frozenset({"gate_proj", "up_proj"})


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

    def of_rank(self, rank: int) -> "AdapterLayout":
        """The same sites with another rank."""
        return AdapterLayout(sites=self.sites, rank=rank)

    @cached_property
    def tensors_at(self) -> dict[int, tuple[ParamTensor, ParamTensor]]:
        """a and b of each site, by site index."""
        pairs = zip(self.sites, self.tensors[::2], self.tensors[1::2], strict=True)
        return {site.index: (a, b) for site, a, b in pairs}

    def pair(self, flat: Tensor, site: int) -> LoraPair:
        """Views into a flat tensor [num_params] of one site, by its index."""
        a, b = self.tensors_at[site]
        return LoraPair(a.view(flat), b.view(flat))

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
    sites = _allowed(base_sites, spec)
    if spec.target_modules is not None and spec.target_modules != ALL_MODULES:
        sites = _named(sites, spec.target_modules)
    return AdapterLayout(sites=sites, rank=spec.rank)


def with_modules(base_sites: Sequence[Site], spec: LoraSpec, names: Sequence[str] | None) -> LoraSpec:
    """spec with those of names that its switches allow, if it names no modules itself; names None leaves it as it is.

    Raises InvalidRequest when the switches allow none of them.
    """
    if spec.target_modules is not None or names is None:
        return spec
    unknown = unknown_modules(_allowed(base_sites, spec), names)
    chosen = [name for name in names if name not in unknown]
    if not chosen:
        raise InvalidRequest(
            f"lora: train_attn, train_mlp and train_unembed leave none of {', '.join(names)}, which this server's adapters change; "
            "switch one on"
        )
    return msgspec.structs.replace(spec, target_modules=chosen)


def unknown_modules(sites: Sequence[Site], names: Sequence[str]) -> list[str]:
    """Those of names, sorted, that name no site. gate_proj and up_proj together also name experts' gate_up_proj."""
    offered = {_last(site) for site in sites}
    fused = _GATE_AND_UP if "gate_up_proj" in offered and set(names) >= _GATE_AND_UP else frozenset()
    return sorted(set(names) - offered - fused)


def module_names(sites: Sequence[Site]) -> list[str]:
    """The last parts of the sites' names, sorted."""
    return sorted({_last(site) for site in sites})


def _allowed(base_sites: Sequence[Site], spec: LoraSpec) -> tuple[Site, ...]:
    groups = {
        SiteGroup.ATTN: spec.train_attn,
        SiteGroup.MLP: spec.train_mlp,
        SiteGroup.UNEMBED: spec.train_unembed,
    }
    sites = tuple(site for site in base_sites if groups[site.group])
    if not sites:
        raise InvalidRequest("lora: train_attn, train_mlp and train_unembed are all false; at least one must be true")
    return sites


def _named(sites: Sequence[Site], names: Sequence[str]) -> tuple[Site, ...]:
    """Those of the sites whose names end in one of names.

    gate_proj and up_proj together also name experts' gate_up_proj, where both are one weight. Raises InvalidRequest for an empty list
    and for a name of no site.
    """
    wanted = set(names)
    if wanted >= _GATE_AND_UP:
        wanted.add("gate_up_proj")
    chosen = tuple(site for site in sites if _last(site) in wanted)
    unknown = unknown_modules(sites, names)
    if unknown or not chosen:
        raise InvalidRequest(
            f"lora.target_modules: {', '.join(unknown) or 'empty'}; modules that can have an adapter here are "
            f"{', '.join(module_names(sites))}"
        )
    return chosen


def _last(site: Site) -> str:
    return site.name.rpartition(".")[2]
