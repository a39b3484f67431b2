"""The trainable parameters of a transformers model as views into one flat tensor, and where their gradients are added.

Legend: P all trained parameters, V vocabulary, D hidden.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from gradstream.engine.trained import ParamTensor

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
# In a layer with experts, the weight of the module that chooses among them.
_ROUTERS = (".gate.weight", ".router.weight")
# Flat order within a layer: what may be computed as one product lies side by side.
_TOGETHER = (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")


@dataclass(frozen=True)
class FullLayout:
    """tensors: every trained parameter by its name in the Hugging Face model, in flat order, without gaps. Tied weights are one."""

    tensors: tuple[ParamTensor, ...]

    @cached_property
    def num_params(self) -> int:
        return self.tensors[-1].stop

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of the names and shapes in order: flat tensors of equal digests mean the same parameters."""
        lines = [f"{tensor.name} {'x'.join(map(str, tensor.shape))}\n" for tensor in self.tensors]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def named_views(self, flat: Tensor) -> dict[str, Tensor]:
        """Views into a flat tensor [num_params], by the names in the Hugging Face model."""
        return {tensor.name: tensor.view(flat) for tensor in self.tensors}


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A parameter of the graph and where its values begin in the flat tensor."""

    parameter: nn.Parameter
    start: int

    def place(self, flat: Tensor) -> None:
        """Let the parameter be a view into flat."""
        shape = self.parameter.shape
        self.parameter.data = flat[self.start : self.start + shape.numel()].view(shape)


class FlatParameters:
    """One model's trained parameters. weights: flat [P] in the compute dtype; it stays the same object for life.

    device: where passes run. While `collecting`, a backward pass adds each parameter's gradient to a flat fp32 tensor as soon as it is
    complete, and frees it. is_fresh: the weights are those of the model's files. frozen: the parameters that are not trained, by name.
    """

    def __init__(self, causal_lm: nn.Module, *, device: torch.device, freeze_router: bool) -> None:
        """Move the parameters to device, each from its own memory into the flat one."""
        named = _in_flat_order(causal_lm)
        trained = {name: value for name, value in named.items() if not (freeze_router and is_router(name))}
        self.layout = FullLayout(tuple(_tensors(trained)))
        self.is_fresh = True
        self.device = device
        dtype = causal_lm.get_parameter(_HEAD).dtype
        self.weights = torch.empty(self.layout.num_params, dtype=dtype, device=device)
        self._leaves: list[_Leaf] = []
        self._sink: Tensor | None = None
        for tensor, parameter in zip(self.layout.tensors, trained.values(), strict=True):
            tensor.view(self.weights).copy_(parameter.detach())
            self._add(parameter, tensor.start)
        self.frozen = {name: value.requires_grad_(False) for name, value in named.items() if name not in trained}
        tied = causal_lm.get_parameter(_HEAD) is causal_lm.get_parameter(_EMBEDDING)
        self._head_name = _EMBEDDING if tied else _HEAD

    def fuse(self, names: Sequence[str]) -> nn.Parameter:
        """One parameter in the place of several that lie side by side and differ in their first size only.

        The caller puts it into the model in their place; the layout goes on naming the several.
        """
        parts = [tensor for tensor in self.layout.tensors if tensor.name in names]
        assert [part.name for part in parts] == list(names), f"{names} are not in flat order"
        assert all(one.stop == other.start for one, other in pairwise(parts)), f"{names} do not lie side by side"
        starts = {part.start for part in parts}
        self._leaves = [leaf for leaf in self._leaves if leaf.start not in starts]
        values = self.weights[parts[0].start : parts[-1].stop].view(-1, *parts[0].shape[1:])
        fused = nn.Parameter(values)
        self._add(fused, parts[0].start)
        return fused

    @contextmanager
    def collecting(self, grad: Tensor | None) -> Iterator[None]:
        """Within the block, backward passes add to grad, flat fp32 [P]; None: there are none."""
        assert self._sink is None, "gradients are being collected already"
        self._sink = grad
        try:
            yield
        finally:
            self._sink = None
            # A pass that broke off leaves some.
            for leaf in self._leaves:
                leaf.parameter.grad = None

    def head_grad(self, grad: Tensor) -> Tensor:
        """Where the unembedding's gradient lies in a flat tensor: [V, D]."""
        (tensor,) = (tensor for tensor in self.layout.tensors if tensor.name == self._head_name)
        return tensor.view(grad)

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters, by their names in the Hugging Face model; other names are left out."""
        for tensor in self.layout.tensors:
            tensor.view(self.weights).copy_(values[tensor.name])

    def move(self, device: torch.device) -> None:
        """Move the weights, and the parameters with them; nothing happens when they are there."""
        if self.weights.device == device:
            return
        self.weights.data = self.weights.data.to(device)
        for leaf in self._leaves:
            leaf.place(self.weights)

    def _add(self, parameter: nn.Parameter, start: int) -> None:
        leaf = _Leaf(parameter, start)
        leaf.place(self.weights)
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(partial(self._collect, start))  # type: ignore[no-untyped-call]  # torch's
        self._leaves.append(leaf)

    @torch.no_grad()
    def _collect(self, start: int, parameter: Tensor) -> None:
        assert self._sink is not None, "a backward pass runs outside of `collecting`"
        assert parameter.grad is not None
        grad = parameter.grad.flatten()
        self._sink[start : start + grad.numel()].add_(grad)
        parameter.grad = None


def is_router(name: str) -> bool:
    """True for the weight that chooses experts, which is neither an expert nor a matrix of features."""
    return name.endswith(_ROUTERS)


def _in_flat_order(causal_lm: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters in its own order, except that each layer begins with q, k and v: weights, then biases."""
    named = dict(causal_lm.named_parameters())
    numbers = {name: number for number, name in enumerate(named)}
    first: dict[str, int] = {}
    for name, number in numbers.items():
        first.setdefault(_layer(name), number)

    def place(name: str) -> tuple[int, int, int]:
        together = [part in name for part in _TOGETHER]
        if any(together):
            return first[_layer(name)], int(name.endswith(".bias")), together.index(True)
        return first[_layer(name)], 2, numbers[name]

    return {name: named[name] for name in sorted(named, key=place)}


def _layer(name: str) -> str:
    """The layer that a parameter belongs to, else its own name."""
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name


def _tensors(named: dict[str, nn.Parameter]) -> Iterator[ParamTensor]:
    at = 0
    for name, parameter in named.items():
        is_matrix = parameter.dim() >= 2 and name not in {_EMBEDDING, _HEAD} and not is_router(name)
        tensor = ParamTensor(name=name, shape=tuple(parameter.shape), start=at, is_matrix=is_matrix)
        yield tensor
        at = tensor.stop
