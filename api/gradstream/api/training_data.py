"""Datums of a training request, checked against the loss's card and laid out as columns.

Checks run on whole columns; a datum is looked for only to name it in an error. T tokens of one datum, K targets of one token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from gradstream.api.catalog import loss_card
from gradstream.shared.catalog import EngineCard, LossCard, LossInput
from gradstream.shared.columns import Column, DType
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.loss_config import Value, is_required, loss_params
from gradstream.shared.wire import IGNORE, ForwardBackward

# Any: numpy arrays of any number type, as a dtype is what is being checked here.
Array = NDArray[Any]
_NAME = attrgetter("name")
# Looking a dtype up by its name takes as long as comparing it twice. As many as cards name, which is a handful.
_dtype = cache(np.dtype)
_TARGETS = "target_tokens"
_TOKEN = np.dtype("<i4")
_LENGTH = np.dtype("<i8")
# By size in bytes.
_UNSIGNED: Mapping[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
# Whole numbers up to here are the same in float32.
_EXACT_IN_FLOAT32 = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DatumArrays:
    """One datum as it came: integer tokens [T], and the loss's inputs by name, each [T, ...]."""

    tokens: Array
    inputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatumColumns:
    """Datums that are alike, end to end: int32 tokens, and inputs of the same names and dtypes, as many values in each as tokens.

    lengths: the tokens of each datum.
    """

    lengths: list[int]
    tokens: bytes
    inputs: Mapping[str, tuple[np.dtype[Any], bytes]]

    def datums(self) -> list[DatumArrays]:
        """Each datum by itself, as views."""
        tokens = np.frombuffer(self.tokens, dtype=_TOKEN)
        inputs = {name: np.frombuffer(data, dtype=dtype) for name, (dtype, data) in self.inputs.items()}
        return [
            DatumArrays(
                tokens=tokens[end - length : end],
                inputs={name: values[end - length : end] for name, values in inputs.items()},
            )
            for length, end in zip(self.lengths, accumulate(self.lengths), strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """A forward_backward request of any dialect, decoded but not yet checked. may_ignore: a target may be IGNORE."""

    datums: Sequence[DatumArrays] | DatumColumns
    loss_fn: str
    loss_config: Mapping[str, float | str]
    backward: bool
    may_ignore: bool = False


def to_payload(data: TrainingData, card: EngineCard) -> ForwardBackward:
    """The wire payload; the same request always gives the same bytes.

    Raises InvalidRequest or Unsupported, naming the datum and the field, for anything the engine behind the card would not take.
    """
    loss = loss_card(card, data.loss_fn)
    params = loss_params(loss, data.loss_config)
    specs = sorted(loss.inputs, key=_NAME)
    if isinstance(data.datums, DatumColumns) and not data.may_ignore and _are_as_read(data.datums, specs):
        tokens, inputs = _columns(data.datums, specs, card)
    else:
        datums = data.datums.datums() if isinstance(data.datums, DatumColumns) else data.datums
        tokens, inputs = _joined_columns(datums, loss, card, params=params, may_ignore=data.may_ignore)
    config = {name: data.loss_config[name] for name in sorted(data.loss_config)}
    return ForwardBackward(tokens=tokens, inputs=inputs, loss_fn=loss.name, loss_config=config, backward=data.backward)


def _are_as_read(datums: DatumColumns, specs: Sequence[LossInput]) -> bool:
    """True when the inputs are just those that the loss reads, each of a dtype that needs no more than widths to change."""
    if len(datums.inputs) != len(specs):
        return False
    for spec in specs:
        if spec.name not in datums.inputs:
            return False
        dtype, wanted = datums.inputs[spec.name][0], _dtype(spec.dtype)
        if dtype != wanted and not (wanted.kind == "i" and dtype.kind == "i"):
            return False
    return True


def _columns(datums: DatumColumns, specs: Sequence[LossInput], card: EngineCard) -> tuple[Column, dict[str, Column]]:
    """The columns of the tokens and of the inputs."""
    # Not by way of _input_column with one array each: that makes the work for a small submit a sixth more.
    _check_lengths(datums.lengths, card)
    lengths = np.array(datums.lengths, dtype=_LENGTH)
    _check_ids(np.frombuffer(datums.tokens, dtype=_TOKEN), lengths, card, field="model_input")
    tokens = Column(dtype="int32", lengths=lengths.tobytes(), data=datums.tokens)
    inputs = {}
    for spec in specs:
        dtype, data = datums.inputs[spec.name]
        values = np.frombuffer(data, dtype=dtype)
        if dtype.kind == "f":
            _check_range(values, lengths, spec)
            inputs[spec.name] = Column(dtype=cast("DType", spec.dtype), lengths=tokens.lengths, data=data)
        else:
            _check_ids(values, lengths, card, field=f"loss_fn_inputs.{spec.name}")
            narrow = data if dtype == _TOKEN else values.astype(_TOKEN).tobytes()
            inputs[spec.name] = Column(dtype="int32", lengths=tokens.lengths, data=narrow)
    return tokens, inputs


def _joined_columns(
    datums: Sequence[DatumArrays], loss: LossCard, card: EngineCard, *, params: Mapping[str, Value], may_ignore: bool
) -> tuple[Column, dict[str, Column]]:
    """The columns of the tokens and of the inputs, after each datum was looked at by itself."""
    if not datums:
        raise InvalidRequest("data: there are no datums; send at least one")
    tokens = _tokens_column(datums, card)
    _check_names(loss, datums)
    trailing = _trailing(datums, loss)
    inputs = {}
    for spec in sorted(loss.inputs, key=_NAME):
        arrays = _input_arrays(spec, datums, loss=loss, params=params, trailing=trailing)
        if arrays is not None:
            inputs[spec.name] = _input_column(spec, arrays, card, like=tokens, trailing=trailing, may_ignore=may_ignore)
    return tokens, inputs


def _check_lengths(counts: Sequence[int], card: EngineCard) -> None:
    if not all(counts):
        raise InvalidRequest(f"data[{counts.index(0)}].model_input: has no tokens; each datum needs at least one")
    longest = max(counts)
    if longest > card.max_context_tokens:
        raise InvalidRequest(
            f"data[{counts.index(longest)}].model_input: {longest} tokens are more than the context of {card.max_context_tokens}"
        )


def _tokens_column(datums: Sequence[DatumArrays], card: EngineCard) -> Column:
    counts = [datum.tokens.shape[0] for datum in datums]
    _check_lengths(counts, card)
    lengths = np.array(counts, dtype=_LENGTH)
    data = _ids([datum.tokens for datum in datums], lengths, card, field="model_input", may_ignore=False)
    return Column(dtype="int32", lengths=lengths.tobytes(), data=data)


def _ids(
    arrays: Sequence[Array], lengths: NDArray[np.int64], card: EngineCard, *, field: str, may_ignore: bool
) -> bytes:
    """The token ids of the arrays end to end, as int32; checked before they are made narrow. lengths counts values."""
    if not may_ignore and all(array.dtype == _TOKEN for array in arrays):
        data = _joined(arrays)
        _check_ids(np.frombuffer(data, dtype=_TOKEN), lengths, card, field=field)
        return data
    values = (np.concatenate(arrays) if len(arrays) > 1 else arrays[0]).reshape(-1)
    _check_ids(np.where(values == IGNORE, 0, values) if may_ignore else values, lengths, card, field=field)
    return values.astype(_TOKEN).tobytes()


def _joined(arrays: Sequence[Array]) -> bytes:
    """The bytes of arrays of one dtype, end to end."""
    return b"".join([array.data if array.flags.c_contiguous else array.tobytes() for array in arrays])


def _check_names(loss: LossCard, datums: Sequence[DatumArrays]) -> None:
    known = {spec.name for spec in loss.inputs}
    for index, datum in enumerate(datums):
        if not datum.inputs.keys() <= known:
            unknown = datum.inputs.keys() - known
            raise InvalidRequest(
                f"data[{index}].loss_fn_inputs: {loss.name} does not read {', '.join(sorted(unknown))}; "
                f"it reads {', '.join(sorted(known))}"
            )


def _trailing(datums: Sequence[DatumArrays], loss: LossCard) -> tuple[int, ...]:
    """() for target_tokens [T], (K,) for [T, K]; the same for all datums of a call."""
    first: tuple[int, ...] | None = None
    for index, datum in enumerate(datums):
        targets = datum.inputs.get(_TARGETS)
        if targets is None:
            continue
        trailing = tuple(targets.shape[1:])
        if not trailing and first in (None, ()):
            first = ()
            continue
        field, shape = f"data[{index}].loss_fn_inputs.{_TARGETS}", list(targets.shape)
        if len(trailing) > 1 or (
            trailing and (loss.max_candidates == 1 or not 1 <= trailing[0] <= loss.max_candidates)
        ):
            wanted = "[T]" if loss.max_candidates == 1 else f"[T] or [T, K] with K from 1 to {loss.max_candidates}"
            raise InvalidRequest(f"{field}: shape {shape}; {loss.name} takes {wanted}")
        if first is not None and trailing != first:
            wanted = ", ".join(["T", *map(str, first)])
            raise InvalidRequest(
                f"{field}: shape {shape}, but earlier datums have [{wanted}]; send them in another call"
            )
        first = trailing
    return first or ()


def _input_arrays(
    spec: LossInput,
    datums: Sequence[DatumArrays],
    *,
    loss: LossCard,
    params: Mapping[str, Value],
    trailing: tuple[int, ...],
) -> list[Array] | None:
    """One loss input of every datum, None when no datum has it and the loss does not need it."""
    if not is_required(spec, params) and not any(spec.name in datum.inputs for datum in datums):
        return None
    arrays: list[Array] = []
    for index, datum in enumerate(datums):
        shape = (datum.tokens.shape[0], *trailing)
        array = datum.inputs.get(spec.name)
        if array is None:
            array = _absent(spec, index, shape, loss=loss, params=params)
        arrays.append(_fitted(array, spec, index, shape))
    return arrays


def _input_column(
    spec: LossInput,
    arrays: Sequence[Array],
    card: EngineCard,
    *,
    like: Column,
    trailing: tuple[int, ...],
    may_ignore: bool,
) -> Column:
    """The column of one loss input, as long as the datums of like; its token ids as int32."""
    num_values = like.lengths_array() * math.prod(trailing)
    if _dtype(spec.dtype).kind == "f":
        data = _joined(arrays)
        _check_range(np.frombuffer(data, dtype=spec.dtype), num_values, spec)
        return Column(dtype=cast("DType", spec.dtype), lengths=like.lengths, data=data, trailing=trailing)
    # The integer inputs of a loss are token ids.
    may_ignore = may_ignore and spec.name == _TARGETS
    data = _ids(arrays, num_values, card, field=f"loss_fn_inputs.{spec.name}", may_ignore=may_ignore)
    return Column(dtype="int32", lengths=like.lengths, data=data, trailing=trailing)


def _absent(
    spec: LossInput, index: int, shape: tuple[int, ...], *, loss: LossCard, params: Mapping[str, Value]
) -> Array:
    stand_in = spec.default if spec.fallback is None else params[spec.fallback]
    if stand_in is None:
        raise InvalidRequest(f"data[{index}].loss_fn_inputs.{spec.name}: missing; {loss.name} needs it for every datum")
    return np.full(shape, stand_in, dtype=spec.dtype)


def _fitted(array: Array, spec: LossInput, index: int, shape: tuple[int, ...]) -> Array:
    """The array in the loss's dtype, after its shape and dtype were checked."""
    target = np.dtype(spec.dtype)
    if array.shape == shape and array.dtype == target:
        return array
    field = f"data[{index}].loss_fn_inputs.{spec.name}"
    if array.ndim == 1 and len(shape) == 1 and array.shape != shape:
        raise InvalidRequest(f"{field}: {array.shape[0]} values, but model_input has {shape[0]} tokens; send as many")
    if array.shape != shape:
        raise InvalidRequest(f"{field}: shape {list(array.shape)}; it must be {list(shape)}")
    if target.kind == "i" and array.dtype.kind != "i":
        raise InvalidRequest(f"{field}: dtype {array.dtype}; it must be {spec.dtype}")
    if target.kind == "f" and array.dtype.kind == "i" and array.size and int(np.abs(array).max()) > _EXACT_IN_FLOAT32:
        raise InvalidRequest(
            f"{field}: an integer above {_EXACT_IN_FLOAT32} has no exact {spec.dtype}; send {spec.dtype}"
        )
    return array.astype(target)


def _check_ids(values: Array, lengths: NDArray[np.int64], card: EngineCard, *, field: str) -> None:
    # As unsigned ones, negative ids are the largest of all.
    if not values.size or np.maximum.reduce(values.view(_UNSIGNED[values.itemsize])) < card.vocab_size:
        return
    bad = int(np.argmin(values)) if int(values.min()) < 0 else int(np.argmax(values))
    _refuse(
        bad,
        lengths,
        field,
        f"token id {int(values[bad])} is outside the vocabulary; ids are 0 to {card.vocab_size - 1}",
    )


def _check_range(values: Array, lengths: NDArray[np.int64], spec: LossInput) -> None:
    is_finite = np.isfinite(values)
    if not np.logical_and.reduce(is_finite):
        bad = int(np.argmin(is_finite))
        _refuse(bad, lengths, f"loss_fn_inputs.{spec.name}", f"the value {float(values[bad])} is not finite")
    if spec.minimum is None and spec.maximum is None:
        return
    low = -math.inf if spec.minimum is None else spec.minimum
    high = math.inf if spec.maximum is None else spec.maximum
    is_out = (values < low) | (values > high)
    if is_out.any():
        bad = int(np.argmax(is_out))
        _refuse(bad, lengths, f"loss_fn_inputs.{spec.name}", f"{float(values[bad])} is not between {low} and {high}")


def _refuse(position: int, lengths: NDArray[np.int64], field: str, problem: str) -> NoReturn:
    """Raise InvalidRequest that names the datum and the value a flat position belongs to; lengths counts values."""
    ends = np.cumsum(lengths)
    index = int(np.searchsorted(ends, position, side="right"))
    offset = position - int(ends[index] - lengths[index])
    raise InvalidRequest(f"data[{index}].{field}[{offset}]: {problem}")
