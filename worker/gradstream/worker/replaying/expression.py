"""A condition as a Python expression of the user's own.

It is the user's code on the user's machine, given on the command line. Nothing that comes from the log or from a client is ever
evaluated: what stands in the log only reaches the expression as values.
"""

import ast
import builtins
import math
from collections.abc import Callable
from types import CodeType

import numpy as np
import torch

from gradstream.shared import codec
from gradstream.shared.wire import Failed, ForwardBackwardDone
from gradstream.worker.inspect.describe import loss_of, metrics_of
from gradstream.worker.replaying.conditions import TENSORS, Condition, Event, State
from gradstream.worker.replaying.errors import CannotReplay

_MODULES: dict[str, object] = {"np": np, "math": math, "torch": torch}


def _error(event: Event) -> object:
    return event.outcome.code if isinstance(event.outcome, Failed) else None


def _outputs(event: Event) -> object:
    if not isinstance(event.outcome, ForwardBackwardDone):
        return None
    return {name: column.arrays() for name, column in event.outcome.outputs.items()}


# What an expression may name, apart from modules and the builtins. A job for which a name is None is passed over.
FACTS: dict[str, Callable[[Event], object]] = {
    "loss": lambda event: loss_of(event.outcome),
    "metrics": lambda event: metrics_of(event.outcome) or None,
    "grad_norm": lambda event: metrics_of(event.outcome).get("grad_norm"),
    "lr": lambda event: metrics_of(event.outcome).get("lr"),
    "step": lambda event: metrics_of(event.outcome).get("step"),
    "outputs": _outputs,
    "error": _error,
    "failed": lambda event: isinstance(event.outcome, Failed),
    "op": lambda event: event.ended.job.op,
    "seq": lambda event: event.ended.job.seq,
    "model": lambda event: event.ended.job.owner,
    "tenant": lambda event: event.ended.job.tenant,
    "job": lambda event: event.ended.job.future_id,
    "batch": lambda event: str(event.batch),
    "num_tokens": lambda event: event.ended.job.num_tokens,
    "digest": lambda event: event.ended.digest,
    "payload": lambda event: codec.decode_payload(event.ended.job.payload),
}


def expression(text: str) -> Condition:
    """The condition that an expression is true. Raises CannotReplay when it is no expression or names what is not there."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise CannotReplay(f"--expr: {text!r} is not a Python expression: {error}") from error
    used = _names(tree)
    known = {*FACTS, *TENSORS, *_MODULES}
    if unknown := sorted(used - known - set(dir(builtins))):
        raise CannotReplay(f"--expr: {unknown[0]!r} is not known; there are {', '.join(sorted(known))}")
    code = compile(tree, "--expr", "eval")
    tensors, facts = used & set(TENSORS), used & set(FACTS)

    def holds(event: Event) -> str | None:
        values: dict[str, object] = {name: FACTS[name](event) for name in facts}
        values |= {name: (event.state or {}).get(name) for name in tensors}
        return _evaluated(code, text, values, where=event.ended.job.future_id)

    def in_state(model: str, state: State) -> str | None:
        values: dict[str, object] = {name: state.get(name) for name in tensors}
        return _evaluated(code, text, {**values, **({"model": model} if "model" in facts else {})}, where=model)

    is_of_state = bool(tensors) and facts <= {"model"}
    return Condition(
        name=text, needs="state" if tensors else "record", holds=holds, in_state=in_state if is_of_state else None
    )


def _names(tree: ast.Expression) -> set[str]:
    """The names that an expression reads and does not bind itself."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound


def _evaluated(code: CodeType, text: str, values: dict[str, object], *, where: str) -> str | None:
    if any(value is None for value in values.values()):
        return None
    try:
        # As globals, so that comprehensions see them too.
        is_true = bool(eval(code, {**_MODULES, **values}))  # noqa: S307 - what the user wrote on the command line
    except Exception as error:
        raise CannotReplay(f"--expr: {text} raised {type(error).__name__} at {where}: {error}") from error
    return f"{text} is true" if is_true else None
