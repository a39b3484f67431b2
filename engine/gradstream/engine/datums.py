"""A forward_backward payload becomes arrays that the model can run, or an error that names the field.

Legend: T tokens of a datum, C candidates (targets) per token, N tokens of all datums of a job.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradstream.engine.losses._base import LOSSES, TARGETS, Loss
from gradstream.shared.catalog import LossCard, LossInput, LossParam
from gradstream.shared.columns import Column
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import ForwardBackward

MAX_CANDIDATES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Datums:
    """All datums of one job, end to end. trailing: () or (C,), the shape that outputs have after the token axis.

    tokens_N int64, targets_NC int64, inputs float32 [N, C] by name, lengths tokens per datum, params every parameter of the loss.
    """

    loss: Loss
    params: dict[str, float]
    lengths: list[int]
    tokens_N: NDArray[np.int64]
    targets_NC: NDArray[np.int64]
    inputs: dict[str, NDArray[np.float32]]
    trailing: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_N)

    @property
    def num_candidates(self) -> int:
        return int(self.targets_NC.shape[1])


def datums_of(payload: ForwardBackward, *, vocab_size: int, max_tokens: int) -> Datums:
    """The payload's datums, checked against the loss's card and the model; raises InvalidRequest."""
    loss = LOSSES.get(payload.loss_fn)
    if loss is None:
        raise InvalidRequest(f"loss_fn: {payload.loss_fn!r} is not known; use one of {', '.join(sorted(LOSSES))}")
    lengths = _lengths(payload.tokens, max_tokens=max_tokens)
    tokens_N = _ids(payload.tokens, "tokens", vocab_size=vocab_size)
    unknown = sorted(set(payload.inputs) - {spec.name for spec in loss.card.inputs})
    if unknown:
        raise InvalidRequest(f"loss_fn_inputs: {loss.card.name} has no input {', '.join(unknown)}")
    targets = payload.inputs.get(TARGETS)
    if targets is None:
        raise InvalidRequest(f"loss_fn_inputs: {TARGETS} is missing; every loss needs it")
    _check_shape(targets, TARGETS, like=payload.tokens, trailing=targets.trailing)
    if len(targets.trailing) > 1 or (targets.trailing and targets.trailing[0] > MAX_CANDIDATES):
        raise InvalidRequest(
            f"loss_fn_inputs.{TARGETS}: shape [T, {', '.join(map(str, targets.trailing))}] is not [T] or [T, C] with C up to "
            f"{MAX_CANDIDATES}"
        )
    targets_N = _ids(targets, f"loss_fn_inputs.{TARGETS}", vocab_size=vocab_size)
    targets_NC = targets_N.reshape(len(tokens_N), -1)
    inputs = {
        spec.name: _input(payload, spec, targets).reshape(targets_NC.shape)
        for spec in loss.card.inputs
        if spec.name != TARGETS
    }
    return Datums(
        loss=loss,
        params=_params(payload, loss.card),
        lengths=lengths,
        tokens_N=tokens_N,
        targets_NC=targets_NC,
        inputs=inputs,
        trailing=targets.trailing,
    )


def _lengths(tokens: Column, *, max_tokens: int) -> list[int]:
    tokens.check("tokens")
    if tokens.trailing:
        raise InvalidRequest(f"tokens: shape [T, {', '.join(map(str, tokens.trailing))}] is not [T]")
    lengths: list[int] = tokens.lengths_array().tolist()
    if not lengths:
        raise InvalidRequest("tokens: the request holds no datum; it must hold at least one")
    for datum, length in enumerate(lengths):
        if length < 1:
            raise InvalidRequest(f"tokens: datum {datum} is empty; it must hold at least one token")
        if length > max_tokens:
            raise InvalidRequest(
                f"tokens: datum {datum} has {length} tokens, and this model takes at most {max_tokens}"
            )
    return lengths


def _ids(column: Column, name: str, *, vocab_size: int) -> NDArray[np.int64]:
    if column.dtype not in ("int32", "int64"):
        raise InvalidRequest(f"{name}: dtype {column.dtype} is not int32 or int64")
    ids = column.values().astype(np.int64, copy=False)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise InvalidRequest(f"{name}: token id {bad} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids


def _check_shape(column: Column, name: str, *, like: Column, trailing: tuple[int, ...]) -> None:
    column.check(f"loss_fn_inputs.{name}")
    if column.lengths != like.lengths:
        raise InvalidRequest(f"loss_fn_inputs.{name}: its lengths are not those of the tokens, datum by datum")
    if column.trailing != trailing:
        raise InvalidRequest(
            f"loss_fn_inputs.{name}: trailing shape {list(column.trailing)} is not that of {TARGETS}, {list(trailing)}"
        )


def _input(payload: ForwardBackward, spec: LossInput, targets: Column) -> NDArray[np.float32]:
    column = payload.inputs.get(spec.name)
    if column is None:
        if spec.required or spec.default is None:
            raise InvalidRequest(f"loss_fn_inputs: {spec.name} is missing; {payload.loss_fn} needs it")
        return np.full(targets.values().shape, spec.default, dtype=np.float32)
    _check_shape(column, spec.name, like=targets, trailing=targets.trailing)
    if column.dtype not in ("float32", "float64"):
        raise InvalidRequest(f"loss_fn_inputs.{spec.name}: dtype {column.dtype} is not float32 or float64")
    values = column.values().astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise InvalidRequest(f"loss_fn_inputs.{spec.name}: holds nan or inf; every value must be finite")
    return values


def _params(payload: ForwardBackward, card: LossCard) -> dict[str, float]:
    specs = {spec.name: spec for spec in card.params}
    unknown = sorted(set(payload.loss_config) - set(specs))
    if unknown:
        known = ", ".join(sorted(specs)) or "none"
        raise InvalidRequest(f"loss_fn_config: {card.name} has no parameter {', '.join(unknown)} (it has: {known})")
    return {name: _param(payload.loss_config.get(name, spec.default), spec) for name, spec in specs.items()}


def _param(value: float | str | None, spec: LossParam) -> float:
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise InvalidRequest(f"loss_fn_config.{spec.name}: {value!r} is not a finite number")
    if spec.minimum is not None and value < spec.minimum:
        raise InvalidRequest(f"loss_fn_config.{spec.name}: {value} is below {spec.minimum}")
    if spec.maximum is not None and value > spec.maximum:
        raise InvalidRequest(f"loss_fn_config.{spec.name}: {value} is above {spec.maximum}")
    return float(value)
