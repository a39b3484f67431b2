"""Lists of numbers in a JSON body as arrays."""

import math
from typing import Any

import msgspec
import numpy as np

from gradstream.api.training_data import Array
from gradstream.shared.errors import InvalidRequest

_NUMBERS = frozenset({int, float, bool})
# More than any loss reads, and few enough that numpy can count the bytes of any such shape.
_MAX_AXES = 3
_MAX_LENGTH = 2**29
_DTYPES = frozenset({"float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"})


class Tensor(msgspec.Struct, forbid_unknown_fields=True):
    """Numbers with their shape, row-major. Clients give every list that they do not know as float32, token ids too."""

    # Any: numbers, or lists of them; numpy finds out in one pass.
    data: list[Any]
    dtype: str = "float32"
    shape: list[int] | None = None


Values = Tensor | list[Any]


def array_of(values: Values, field: str) -> Array:
    """int64 where every value is a whole number in JSON, else float64; a tensor in its shape, lists as they are nested.

    Raises InvalidRequest, naming the field, for what is no array of numbers.
    """
    data = values.data if isinstance(values, Tensor) else values
    # Before numpy, which would make room for each value as long as the longest text.
    if not _are_numbers(data):
        raise InvalidRequest(f"{field}: holds {_first_wrong(data)}; send numbers, each within 64 bits")
    try:
        array: Array = np.array(data or [], dtype=None if data else np.int64)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"{field}: its lists are of different lengths; send an array, or the numbers with their shape"
        ) from error
    if array.dtype.kind == "b":
        array = array.astype(np.int64)
    if array.dtype.kind not in "if":
        raise InvalidRequest(f"{field}: holds {_first_wrong(data)}; send numbers, each within 64 bits")
    return _shaped(array, values, field) if isinstance(values, Tensor) else array


def _shaped(array: Array, tensor: Tensor, field: str) -> Array:
    if tensor.dtype not in _DTYPES:
        raise InvalidRequest(f"{field}.dtype: {tensor.dtype[:40]!r} is not one of {', '.join(sorted(_DTYPES))}")
    if tensor.shape is None or list(array.shape) == tensor.shape:
        return array
    is_shape = len(tensor.shape) <= _MAX_AXES and all(0 <= size < _MAX_LENGTH for size in tensor.shape)
    if not is_shape or math.prod(tensor.shape) != array.size:
        raise InvalidRequest(f"{field}: {array.size} values do not fill the shape {str(tensor.shape[:8])[:80]}")
    return array.reshape(tensor.shape)


def _are_numbers(data: list[Any], *, depth: int = 1) -> bool:
    """True for numbers, and lists of them that are not deeper than arrays. depth: lists around the values, this one included."""
    kinds = set(map(type, data))
    if list not in kinds:
        return kinds <= _NUMBERS
    return depth < _MAX_AXES and all(
        _are_numbers(item, depth=depth + 1) if type(item) is list else type(item) in _NUMBERS for item in data
    )


def _first_wrong(data: object, *, depth: int = 0) -> str:
    """The first value that is no number, as text."""
    if isinstance(data, list):
        if depth == _MAX_AXES:
            return "lists in lists too deep"
        for item in data:
            if found := _first_wrong(item, depth=depth + 1):
                return found
        return ""
    if isinstance(data, int | float) and abs(data) < 2**63:
        return ""
    return repr(data[:40] if isinstance(data, str) else data)[:40]


def whole_numbers(array: Array, field: str) -> Array:
    """The array as int64; raises InvalidRequest when a value has a fraction or does not fit."""
    if array.dtype.kind == "i":
        return array
    is_whole = np.isfinite(array) & (np.abs(array) < 2**53) & (array == np.floor(array))
    if not is_whole.all():
        bad = int(np.argmin(is_whole.reshape(-1)))
        raise InvalidRequest(
            f"{field}[{bad}]: {float(array.reshape(-1)[bad])} is not a whole number; these are token ids"
        )
    return array.astype(np.int64)


def float32(array: Array) -> Array:
    """The array as float32. A value beyond it becomes infinite, and the check of finiteness names it."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
