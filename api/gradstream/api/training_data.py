"""Datums of a training request, checked against the loss's card and laid out as columns.

Checks run on whole columns; a datum is looked for only to name it in an error. T tokens of one datum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from gradstream.api.catalog import loss_card
from gradstream.shared.catalog import EngineCard, LossCard, LossInput, LossParam
from gradstream.shared.columns import Column, DType
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.wire import ForwardBackward

# Any: numpy arrays of any number type, as a dtype is what is being checked here.
Array = NDArray[Any]
# Whole numbers up to here are the same in float32.
_EXACT_IN_FLOAT32 = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DatumArrays:
    """One datum as it came: integer tokens [T], and the loss's inputs by name, each [T, ...]."""

    tokens: Array
    inputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """A forward_backward request of any dialect, decoded but not yet checked."""

    datums: Sequence[DatumArrays]
    loss_fn: str
    loss_config: Mapping[str, float | str]
    backward: bool


def to_payload(data: TrainingData, card: EngineCard) -> ForwardBackward:
    """The wire payload; the same request always gives the same bytes.

    Raises InvalidRequest or Unsupported, naming the datum and the field, for anything the engine behind the card would not take.
    """
    loss = loss_card(card, data.loss_fn)
    config = _checked_config(loss, data.loss_config)
    if not data.datums:
        raise InvalidRequest("data: there are no datums; send at least one")
    tokens = _tokens_column(data.datums, card)
    _check_names(loss, data.datums)
    inputs: dict[str, Column] = {}
    for spec in sorted(loss.inputs, key=lambda item: item.name):
        column = _input_column(spec, data.datums, loss=loss, card=card)
        if column is not None:
            inputs[spec.name] = column
    return ForwardBackward(tokens=tokens, inputs=inputs, loss_fn=loss.name, loss_config=config, backward=data.backward)


def _tokens_column(datums: Sequence[DatumArrays], card: EngineCard) -> Column:
    lengths = np.array([datum.tokens.shape[0] for datum in datums], dtype=np.int64)
    if not lengths.all():
        raise InvalidRequest(
            f"data[{int(np.argmin(lengths))}].model_input: has no tokens; each datum needs at least one"
        )
    if int(lengths.max()) > card.max_context_tokens:
        raise InvalidRequest(
            f"data[{int(np.argmax(lengths))}].model_input: {int(lengths.max())} tokens are more than the context of "
            f"{card.max_context_tokens}"
        )
    values = np.concatenate([datum.tokens for datum in datums])
    _check_ids(values, lengths, card, field="model_input")
    return Column(dtype="int32", lengths=lengths.astype("<i8").tobytes(), data=values.astype("<i4").tobytes())


def _check_names(loss: LossCard, datums: Sequence[DatumArrays]) -> None:
    known = {spec.name for spec in loss.inputs}
    for index, datum in enumerate(datums):
        unknown = datum.inputs.keys() - known
        if unknown:
            raise InvalidRequest(
                f"data[{index}].loss_fn_inputs: {loss.name} does not read {', '.join(sorted(unknown))}; "
                f"it reads {', '.join(sorted(known))}"
            )


def _input_column(spec: LossInput, datums: Sequence[DatumArrays], *, loss: LossCard, card: EngineCard) -> Column | None:
    """The column of one loss input, or None when no datum has it and the loss does not need it."""
    num_given = sum(spec.name in datum.inputs for datum in datums)
    if num_given == 0 and not spec.required:
        return None
    arrays: list[Array] = []
    for index, datum in enumerate(datums):
        array = datum.inputs.get(spec.name)
        if array is None:
            array = _absent(spec, index, datum, loss)
        arrays.append(_fitted(array, spec, index, num_tokens=datum.tokens.shape[0]))
    column = Column.of(cast("list[NDArray[np.generic]]", arrays), dtype=cast("DType", spec.dtype))
    values: Array = column.values()
    if values.dtype.kind == "f":
        _check_finite(values, column.lengths_array(), spec.name)
    else:
        # The integer inputs of a loss are token ids.
        _check_ids(values, column.lengths_array(), card, field=f"loss_fn_inputs.{spec.name}")
    return column


def _absent(spec: LossInput, index: int, datum: DatumArrays, loss: LossCard) -> Array:
    if spec.default is None:
        raise InvalidRequest(f"data[{index}].loss_fn_inputs.{spec.name}: missing; {loss.name} needs it for every datum")
    return np.full(datum.tokens.shape[0], spec.default, dtype=spec.dtype)


def _fitted(array: Array, spec: LossInput, index: int, *, num_tokens: int) -> Array:
    """The array in the loss's dtype, after its shape and dtype were checked."""
    field = f"data[{index}].loss_fn_inputs.{spec.name}"
    if array.ndim > 1:
        raise Unsupported(
            f"{field}: shape {list(array.shape)}; this server takes one value per token, shape [{num_tokens}]"
        )
    if array.shape[0] != num_tokens:
        raise InvalidRequest(f"{field}: {array.shape[0]} values, but model_input has {num_tokens} tokens; send as many")
    target = np.dtype(spec.dtype)
    if array.dtype == target:
        return array
    if target.kind == "i" and array.dtype.kind != "i":
        raise InvalidRequest(f"{field}: dtype {array.dtype}; it must be {spec.dtype}")
    if target.kind == "f" and array.dtype.kind == "i" and array.size and int(np.abs(array).max()) > _EXACT_IN_FLOAT32:
        raise InvalidRequest(
            f"{field}: an integer above {_EXACT_IN_FLOAT32} has no exact {spec.dtype}; send {spec.dtype}"
        )
    return array.astype(target)


def _check_ids(values: Array, lengths: NDArray[np.int64], card: EngineCard, *, field: str) -> None:
    if not values.size:
        return
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < card.vocab_size:
        return
    bad = int(np.argmin(values)) if low < 0 else int(np.argmax(values))
    _refuse(
        bad,
        lengths,
        field,
        f"token id {int(values[bad])} is outside the vocabulary; ids are 0 to {card.vocab_size - 1}",
    )


def _check_finite(values: Array, lengths: NDArray[np.int64], name: str) -> None:
    is_finite = np.isfinite(values)
    if is_finite.all():
        return
    bad = int(np.argmin(is_finite))
    _refuse(bad, lengths, f"loss_fn_inputs.{name}", f"the value {float(values[bad])} is not finite")


def _refuse(position: int, lengths: NDArray[np.int64], field: str, problem: str) -> NoReturn:
    """Raise InvalidRequest that names the datum and the token a flat position belongs to."""
    ends = np.cumsum(lengths)
    index = int(np.searchsorted(ends, position, side="right"))
    offset = position - int(ends[index] - lengths[index])
    raise InvalidRequest(f"data[{index}].{field}[{offset}]: {problem}")


def _checked_config(loss: LossCard, config: Mapping[str, float | str]) -> dict[str, float | str]:
    """The config in name order, after each value was checked against the loss's card."""
    params = {param.name: param for param in loss.params}
    unknown = config.keys() - params.keys()
    if unknown:
        known = ", ".join(sorted(params)) or "none"
        raise InvalidRequest(f"loss_fn_config: {loss.name} has no {', '.join(sorted(unknown))}; it has: {known}")
    return {name: _checked_param(params[name], config[name]) for name in sorted(config)}


def _checked_param(param: LossParam, value: float | str) -> float | str:
    field = f"loss_fn_config.{param.name}"
    if isinstance(param.default, str):
        if not isinstance(value, str):
            raise InvalidRequest(f"{field}: {value} is a number; it must be a text")
        return value
    if isinstance(value, str):
        raise InvalidRequest(f"{field}: {value!r} is a text; it must be a number")
    number = float(value)
    low = -np.inf if param.minimum is None else param.minimum
    high = np.inf if param.maximum is None else param.maximum
    if not np.isfinite(number) or not low <= number <= high:
        raise InvalidRequest(f"{field}: {number} is not between {low} and {high}")
    return number
