"""Modules of a model whose activations are computed again in the backward pass instead of kept until then.

A unit keeps its inputs; what lies between them and its outputs is forgotten after the forward pass. Every decoder layer is a unit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradstream.engine.adapters.modules import AdaptedExperts, AdaptedLinear, PassSlot
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.models.merged_qkv import MergedLinear
from gradstream.shared.errors import Unsupported

_TRUNK = "model"
_LAYERS = "model.layers"

_Call = Callable[..., Any]  # Any: whatever a module of transformers takes and returns


def find_units(causal_lm: nn.Module, class_names: Sequence[str]) -> list[str]:
    """Paths of the modules below the trunk whose class has one of these names, in the model's order.

    Call it before modules are exchanged: the names are those that transformers gives. Raises Unsupported for a name that no
    module has.
    """
    offered: dict[str, list[str]] = {}
    for path, module in causal_lm.get_submodule(_TRUNK).named_modules(prefix=_TRUNK):
        if path != _TRUNK and not isinstance(module, nn.ModuleList):
            offered.setdefault(type(module).__name__, []).append(path)
    if unknown := [name for name in class_names if name not in offered]:
        raise Unsupported(
            f"basic_modules: {type(causal_lm).__name__} has no module of class {', '.join(unknown)}; it has "
            f"{', '.join(sorted(offered))}"
        )
    wanted = {path for name in class_names for path in offered[name]}
    return [path for path in chain.from_iterable(offered.values()) if path in wanted]


def recompute(causal_lm: nn.Module, paths: Sequence[str], slot: PassSlot, *, is_reentrant: bool) -> None:
    """Make the decoder layers, and the modules at these paths, units. Passes without gradients are as before.

    A recomputation does what the forward pass did, on the same inputs and with the same adapters, so losses and gradients have
    the same bits. is_reentrant: torch's older way, a backward pass within the backward pass. Compile modules before this. Raises
    Unsupported for is_reentrant with further modules: the gradient of what a layer uses several times would be added up in another
    order.
    """
    if paths and is_reentrant:
        raise Unsupported(
            "basic_modules: belongs to the other kind of gradient checkpointing; use enable_reentrant: false"
        )
    layers = [f"{_LAYERS}.{name}" for name, _ in causal_lm.get_submodule(_LAYERS).named_children()]
    for path in dict.fromkeys([*layers, *paths]):
        module = causal_lm.get_submodule(path)
        unit = _Unit(_call_of(module), slot, is_reentrant=is_reentrant, is_trained=_is_trained(module))
        # Where torch's own compiled calls go: hooks of a module, and its compiled code, are inside.
        module._compiled_call_impl = unit.__call__  # noqa: SLF001


def _call_of(module: nn.Module) -> _Call:
    compiled: _Call | None = module._compiled_call_impl  # noqa: SLF001
    return module._call_impl if compiled is None else compiled  # noqa: SLF001


def _is_trained(module: nn.Module) -> bool:
    """True where outputs of the module depend on something that is trained, whatever its inputs are."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        isinstance(part, AdaptedLinear | AdaptedExperts | MergedLinear) for part in module.modules()
    )


class _Unit:
    """A module's call, with its recomputation."""

    def __init__(self, call: _Call, slot: PassSlot, *, is_reentrant: bool, is_trained: bool) -> None:
        self._call = call
        self._slot = slot
        self._is_reentrant = is_reentrant
        self._is_trained = is_trained

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the module's own)
        if not torch.is_grad_enabled():
            return self._call(*args, **kwargs)
        run = partial(self._run, self._slot.current, **kwargs)
        if not self._is_reentrant:
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        if not self._is_trained:
            return run(*args)
        # The reentrant kind takes its outputs for constants unless an input wants a gradient, which token ids and the
        # embeddings of a frozen model do not.
        anchor = torch.zeros((), requires_grad=True)
        return checkpoint(partial(_without_first, run), anchor, *args, use_reentrant=True, preserve_rng_state=False)

    def _run(self, adapters: AdapterPass | None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (as above)
        """The module with these adapters in the slot: a recomputation comes when the pass has left it."""
        before = self._slot.current
        self._slot.current = adapters
        try:
            return self._call(*args, **kwargs)
        finally:
            self._slot.current = before


def _without_first(run: _Call, _anchor: torch.Tensor, *args: Any) -> Any:  # noqa: ANN401 (as above)
    return run(*args)
