"""The q, k and v projections of an attention layer as one matrix product, while each keeps its place and its name.

Legend: T tokens, I in features, O out features of all three.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstream.engine.adapters.linear import Block, lora_linear
from gradstream.engine.adapters.modules import AdaptedLinear
from gradstream.engine.models.full_linear import FullLinear

_NAMES = ("q_proj", "k_proj", "v_proj")
_FUSED = "qkv_proj"


class SharedProduct:
    """One product whose column blocks are handed out to several modules that are called with the same input, one after the other.

    The first of them computes it. Nothing is kept once each has had its block. Another input computes anew, so that no order of calls
    gives a wrong result.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> None:
        """run: x [..., I] -> y [..., O]. sizes: columns of each block."""
        self._run = run
        self._sizes = list(sizes)
        self._x: Tensor | None = None
        self._blocks: list[Tensor | None] = [None] * len(self._sizes)

    def take(self, place: int, x: Tensor) -> Tensor:
        """Block number place of the product for x."""
        block = self._blocks[place] if self._x is x else None
        if block is None:
            # An input whose product failed must not be kept, nor what is left of the one before.
            self._x, self._blocks = None, [None] * len(self._sizes)
            self._blocks = list(torch.split(self._run(x), self._sizes, dim=-1))
            self._x = x
            block = self._blocks[place]
            assert block is not None
        self._blocks[place] = None
        if all(other is None for other in self._blocks):
            self._x = None
        return block


class MergedLinear(nn.Module):
    """What stands in the place of one of the projections; frozen weights stay with it, as rows of the merged ones."""

    def __init__(self, base: nn.Module, *, shared: SharedProduct, place: int, keeps_weights: bool) -> None:
        super().__init__()
        if keeps_weights:
            self.weight = base.weight
            self.bias = base.bias
        self.in_features = base.in_features
        self.out_features = base.out_features
        self._shared = shared
        self._place = place

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> this projection's columns of y."""
        return self._shared.take(self._place, x)


class _AdaptedProduct:
    """The frozen product of all projections plus what the running pass's adapters add to each."""

    def __init__(self, parts: Sequence[AdaptedLinear]) -> None:
        self._slot = parts[0].slot
        self._weight_OI = join_rows([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        self._bias_O = join_rows(biases) if biases else None
        columns = torch.tensor([0, *(part.out_features for part in parts)]).cumsum(0).tolist()
        self._sites = [(part.site_index, column) for part, column in zip(parts, columns, strict=False)]

    def __call__(self, x: Tensor) -> Tensor:
        adapters = self._slot.current
        if adapters is None:
            return F.linear(x, self._weight_OI, self._bias_O)
        patches = [
            replace(patch, column=column) for site, column in self._sites for patch in adapters.grouped_patches(site)
        ]
        anchor = adapters.anchor if adapters.is_training else None
        block = Block(0, x.shape[-2], self._weight_OI, self._slot.product)
        return lora_linear(x, [block], self._bias_O, patches, anchor)


def join_rows(parameters: Sequence[Tensor]) -> Tensor:
    """The frozen parameters, one below the other; afterwards each is a view into the result."""
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(
        parameters, torch.split(joined, [len(parameter) for parameter in parameters]), strict=True
    ):
        parameter.data = rows
    return joined


def merge_adapted(layers: nn.Module) -> int:
    """Merge the projections of adapted attention layers; returns how many layers there were."""
    count = 0
    for _, attention in _attentions(layers):
        parts = [attention.get_submodule(name) for name in _NAMES]
        if not all(isinstance(part, AdaptedLinear) for part in parts):
            continue
        _put(attention, _AdaptedProduct(parts), parts, keeps_weights=True)  # type: ignore[arg-type]  # checked above
        count += 1
    return count


def merge_trained(layers: nn.Module, *, prefix: str, fuse: Callable[[Sequence[str]], nn.Parameter]) -> int:
    """Merge the projections of layers whose weights are trained; returns how many layers there were.

    prefix: the name of layers in the model. fuse: parameters by their names, one below the other, as one parameter.
    """
    count = 0
    for path, attention in _attentions(layers):
        parts = [attention.get_submodule(name) for name in _NAMES]
        names = [f"{prefix}.{path}.{name}" for name in _NAMES]
        weight = fuse([f"{name}.weight" for name in names])
        bias = None if parts[0].bias is None else fuse([f"{name}.bias" for name in names])
        fused = FullLinear(weight, bias)
        _put(attention, fused, parts, keeps_weights=False)
        attention.add_module(_FUSED, fused)
        count += 1
    return count


def _attentions(layers: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in layers.named_modules() if all(hasattr(module, name) for name in _NAMES)]


def _put(
    attention: nn.Module, run: Callable[[Tensor], Tensor], parts: Sequence[nn.Module], *, keeps_weights: bool
) -> None:
    shared = SharedProduct(run, [int(part.out_features) for part in parts])  # type: ignore[arg-type]  # linear layers
    for place, (name, part) in enumerate(zip(_NAMES, parts, strict=True)):
        setattr(attention, name, MergedLinear(part, shared=shared, place=place, keeps_weights=keeps_weights))
