"""A forward_backward payload becomes arrays that the model can run, or an error that names the field.

Legend: T tokens of a datum, C candidates (targets) per token, N tokens of all datums of a job.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradstream.engine.losses._base import LOSSES, REFUSED, TARGETS, Loss
from gradstream.shared.catalog import LossCard, LossInput
from gradstream.shared.columns import Column
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.loss_config import Value, is_required, loss_params
from gradstream.shared.wire import IGNORE, ForwardBackward


@dataclass(frozen=True, slots=True, kw_only=True)
class Datums:
    """All datums of one job, end to end. trailing: () or (C,), the shape that outputs have after the token axis.

    tokens_N int64, targets_NC int64, inputs float32 [N, C] by name, lengths tokens per datum, params every parameter of the loss.
    is_valid_N: the tokens whose targets are not IGNORE; None when all are valid.
    """

    loss: Loss
    params: dict[str, Value]
    lengths: list[int]
    tokens_N: NDArray[np.int64]
    targets_NC: NDArray[np.int64]
    inputs: dict[str, NDArray[np.float32]]
    trailing: tuple[int, ...]
    is_valid_N: NDArray[np.bool_] | None

    @property
    def num_valid(self) -> int:
        return self.num_tokens if self.is_valid_N is None else int(self.is_valid_N.sum())

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_N)

    @property
    def num_candidates(self) -> int:
        return int(self.targets_NC.shape[1])


def datums_of(payload: ForwardBackward, *, vocab_size: int, max_tokens: int) -> Datums:
    """The payload's datums, checked against the loss's card and the model; raises InvalidRequest or Unsupported."""
    loss = _loss(payload.loss_fn)
    params = loss_params(loss.card, payload.loss_config)
    lengths = _lengths(payload.tokens, max_tokens=max_tokens)
    tokens_N = _ids(payload.tokens, "tokens", vocab_size=vocab_size)
    unknown = sorted(set(payload.inputs) - {spec.name for spec in loss.card.inputs})
    if unknown:
        raise InvalidRequest(f"loss_fn_inputs: {loss.card.name} has no input {', '.join(unknown)}")
    targets = _targets(payload, loss.card)
    targets_NC, is_valid_N = _target_ids(targets, vocab_size=vocab_size)
    inputs = {
        name: values.reshape(targets_NC.shape) for name, values in _inputs(payload, loss.card, params, targets).items()
    }
    _check_order(loss.card, inputs)
    return Datums(
        loss=loss,
        params=params,
        lengths=lengths,
        tokens_N=tokens_N,
        targets_NC=targets_NC,
        inputs=inputs,
        trailing=targets.trailing,
        is_valid_N=is_valid_N,
    )


def _loss(name: str) -> Loss:
    refusal = REFUSED.get(name)
    if refusal is not None:
        raise Unsupported(refusal)
    loss = LOSSES.get(name)
    if loss is None:
        raise InvalidRequest(f"loss_fn: {name!r} is not known; use one of {', '.join(sorted(LOSSES))}")
    return loss


def _targets(payload: ForwardBackward, card: LossCard) -> Column:
    targets = payload.inputs.get(TARGETS)
    if targets is None:
        raise InvalidRequest(f"loss_fn_inputs: {TARGETS} is missing; every loss needs it")
    _check_shape(targets, TARGETS, like=payload.tokens, trailing=targets.trailing)
    if targets.trailing and (card.max_candidates == 1 or targets.trailing > (card.max_candidates,)):
        wanted = "[T]" if card.max_candidates == 1 else f"[T] or [T, K] with K up to {card.max_candidates}"
        raise InvalidRequest(
            f"loss_fn_inputs.{TARGETS}: shape [T, {', '.join(map(str, targets.trailing))}] is not {wanted}"
        )
    return targets


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
    _check_ids(ids, name, vocab_size=vocab_size)
    return ids


def _check_ids(ids: NDArray[np.int64], name: str, *, vocab_size: int) -> None:
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise InvalidRequest(f"{name}: token id {bad} is outside the vocabulary, 0 to {vocab_size - 1}")


def _target_ids(targets: Column, *, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """(the targets with 0 in the place of IGNORE, [N, C]; which tokens are valid, [N], None when all are)."""
    field = f"loss_fn_inputs.{TARGETS}"
    if targets.dtype not in ("int32", "int64"):
        raise InvalidRequest(f"{field}: dtype {targets.dtype} is not int32 or int64")
    num_tokens = int(targets.lengths_array().sum())
    ids_NC = targets.values().astype(np.int64, copy=False).reshape(num_tokens, -1)
    is_ignored_NC = ids_NC == IGNORE
    if not is_ignored_NC.any():
        _check_ids(ids_NC, field, vocab_size=vocab_size)
        return ids_NC, None
    is_ignored_N = is_ignored_NC.any(axis=1)
    if not np.array_equal(is_ignored_N, is_ignored_NC.all(axis=1)):
        token = int(np.flatnonzero(is_ignored_N & ~is_ignored_NC.all(axis=1))[0])
        raise InvalidRequest(
            f"{field}: some targets of token {token} of the call are {IGNORE}; all of a token's targets are, or none"
        )
    ids_NC = np.where(is_ignored_NC, 0, ids_NC)
    _check_ids(ids_NC, field, vocab_size=vocab_size)
    return ids_NC, ~is_ignored_N


def _check_shape(column: Column, name: str, *, like: Column, trailing: tuple[int, ...]) -> None:
    column.check(f"loss_fn_inputs.{name}")
    if column.lengths != like.lengths:
        raise InvalidRequest(f"loss_fn_inputs.{name}: its lengths are not those of the tokens, datum by datum")
    if column.trailing != trailing:
        raise InvalidRequest(
            f"loss_fn_inputs.{name}: trailing shape {list(column.trailing)} is not that of {TARGETS}, {list(trailing)}"
        )


def _inputs(
    payload: ForwardBackward, card: LossCard, params: dict[str, Value], targets: Column
) -> dict[str, NDArray[np.float32]]:
    """Every float input of the card that was sent or that something stands in for, in the shape of the targets."""
    inputs = {}
    for spec in card.inputs:
        if spec.name == TARGETS:
            continue
        column = payload.inputs.get(spec.name)
        if column is not None:
            inputs[spec.name] = _input(column, spec, targets)
            continue
        if is_required(spec, params):
            raise InvalidRequest(f"loss_fn_inputs: {spec.name} is missing; {payload.loss_fn} needs it")
        stand_in = spec.default if spec.fallback is None else params[spec.fallback]
        if stand_in is not None:
            inputs[spec.name] = np.full(targets.values().shape, stand_in, dtype=np.float32)
    return inputs


def _input(column: Column, spec: LossInput, targets: Column) -> NDArray[np.float32]:
    field = f"loss_fn_inputs.{spec.name}"
    _check_shape(column, spec.name, like=targets, trailing=targets.trailing)
    if column.dtype not in ("float32", "float64"):
        raise InvalidRequest(f"{field}: dtype {column.dtype} is not float32 or float64")
    values = column.values().astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise InvalidRequest(f"{field}: holds nan or inf; every value must be finite")
    if values.size and spec.minimum is not None and float(values.min()) < spec.minimum:
        raise InvalidRequest(f"{field}: holds {values.min()}; no value may be below {spec.minimum}")
    if values.size and spec.maximum is not None and float(values.max()) > spec.maximum:
        raise InvalidRequest(f"{field}: holds {values.max()}; no value may be above {spec.maximum}")
    return values


def _check_order(card: LossCard, inputs: dict[str, NDArray[np.float32]]) -> None:
    """Raise InvalidRequest where an input that stands in for a parameter breaks that parameter's order."""
    for param in card.params:
        if param.not_above is None or param.name not in inputs or param.not_above not in inputs:
            continue
        is_above = inputs[param.name] > inputs[param.not_above]
        if is_above.any():
            token = int(np.argwhere(is_above)[0][0])
            low, high = float(inputs[param.name][token].max()), float(inputs[param.not_above][token].min())
            raise InvalidRequest(
                f"loss_fn_inputs.{param.name}: {low:g} is above {param.not_above}, {high:g}, at token {token} of the call"
            )
