"""Sparse matrices of a request (compressed sparse rows), checked and made dense.

Legend: R rows, K columns, n stored values.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradstream.api.training_data import Array
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge

# Values of one request's sparse matrices once they are dense: what bounds the memory that a few bytes can ask for.
MAX_DENSE_VALUES = 1 << 24


@dataclass(slots=True)
class DenseRoom:
    """How many values the sparse matrices of one request may still grow to."""

    left: int = MAX_DENSE_VALUES

    def take(self, count: int, field: str) -> None:
        """Raise PayloadTooLarge when count more values do not fit."""
        self.left -= count
        if self.left < 0:
            raise PayloadTooLarge(
                f"{field}: the sparse matrices of this request hold more than {MAX_DENSE_VALUES} values when dense; send fewer "
                "datums in one call"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """values [n] of a matrix [R, K]: row r has those from crow[r] to crow[r + 1], in the columns col."""

    values: Array
    crow: NDArray[np.int64]
    col: NDArray[np.int64]
    shape: list[int] | None


def dense(rows: SparseRows, field: str, room: DenseRoom) -> Array:
    """The matrix [R, K] in the dtype of the values, 0 where none is stored.

    Raises InvalidRequest, naming field and index, unless the indices describe one such matrix; PayloadTooLarge when it is too big.
    """
    if rows.shape is None or len(rows.shape) != 2 or min(rows.shape) < 0:
        raise InvalidRequest(f"{field}: a sparse tensor needs its shape [T, K]; it came with {rows.shape}")
    num_rows, num_columns = rows.shape
    _check_rows(rows, num_rows, field)
    num_values = rows.values.size
    row_of_value = np.repeat(np.arange(num_rows), np.diff(rows.crow))
    if num_values and (int(rows.col.min()) < 0 or int(rows.col.max()) >= num_columns):
        at = int(np.argmax((rows.col < 0) | (rows.col >= num_columns)))
        raise InvalidRequest(f"{field}: col_indices[{at}] is {int(rows.col[at])}; columns are 0 to {num_columns - 1}")
    is_back = (np.diff(row_of_value) == 0) & (np.diff(rows.col) <= 0)
    if is_back.any():
        at = int(np.argmax(is_back)) + 1
        raise InvalidRequest(
            f"{field}: col_indices[{at}] is {int(rows.col[at])} after {int(rows.col[at - 1])}; columns must rise within a row"
        )
    room.take(num_rows * num_columns, field)
    matrix = np.zeros((num_rows, num_columns), dtype=rows.values.dtype)
    matrix[row_of_value, rows.col] = rows.values
    return matrix


def _check_rows(rows: SparseRows, num_rows: int, field: str) -> None:
    if rows.crow.size != num_rows + 1:
        raise InvalidRequest(
            f"{field}: crow_indices has {rows.crow.size} entries; shape {rows.shape} needs {num_rows + 1}"
        )
    if rows.col.size != rows.values.size:
        raise InvalidRequest(f"{field}: {rows.col.size} col_indices for {rows.values.size} values; send one for each")
    if int(rows.crow[0]) != 0 or int(rows.crow[-1]) != rows.values.size:
        raise InvalidRequest(
            f"{field}: crow_indices goes from {int(rows.crow[0])} to {int(rows.crow[-1])}; it must go from 0 to the number of "
            f"values, {rows.values.size}"
        )
    is_falling = rows.crow[1:] < rows.crow[:-1]
    if is_falling.any():
        at = int(np.argmax(is_falling)) + 1
        raise InvalidRequest(
            f"{field}: crow_indices[{at}] is {int(rows.crow[at])} after {int(rows.crow[at - 1])}; it must not fall"
        )
