"""A table of token ids to score at a prompt's positions, dense or sparse."""

import math
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradstream.shared.errors import InvalidRequest

# The id of a cell that asks for nothing.
NO_TOKEN = -1
_MAX_COLUMNS = 2**31 - 1


class PromptTargets(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token ids to score: row i of [rows, columns] is about prompt position i + 1.

    token_ids: int32 [cells], little-endian; -1 asks for nothing. Dense: all cells, row-major. Sparse: the cells of a CSR matrix with
    crow_indices int64 [rows + 1] and col_indices int64 [cells]. One that came from a client is checked by `check`, never trusted.
    """

    shape: tuple[int, int]
    token_ids: bytes
    crow_indices: bytes | None = None
    col_indices: bytes | None = None

    def ids(self) -> NDArray[np.int32]:
        """int32 [cells]; a view."""
        return np.frombuffer(self.token_ids, dtype="<i4")

    def rows(self) -> NDArray[np.int64]:
        """int64 [cells]: the row of each cell, ascending."""
        num_rows, num_columns = self.shape
        if self.crow_indices is None:
            return np.repeat(np.arange(num_rows), num_columns)
        return np.repeat(np.arange(num_rows), np.diff(np.frombuffer(self.crow_indices, dtype="<i8")))

    def check(self, name: str, *, num_rows: int, vocab_size: int) -> None:
        """Raise InvalidRequest, naming the field, unless the parts agree, there are num_rows rows and all ids exist."""
        if self.shape[0] != num_rows or not 0 <= self.shape[1] <= _MAX_COLUMNS:
            raise InvalidRequest(
                f"{name}: shape {list(self.shape)}; it must be [{num_rows}, K], one row for each prompt token but the first"
            )
        if len(self.token_ids) % 4:
            raise InvalidRequest(f"{name}: {len(self.token_ids)} bytes; it must hold whole int32 ids")
        ids = self.ids()
        self._check_layout(name, num_cells=len(ids))
        if ids.size and (ids.min() < NO_TOKEN or ids.max() >= vocab_size):
            outside = int(ids.min() if ids.min() < NO_TOKEN else ids.max())
            raise InvalidRequest(
                f"{name}: token {outside} is outside the vocabulary; ids are 0 to {vocab_size - 1}, or -1 for nothing"
            )

    def _check_layout(self, name: str, *, num_cells: int) -> None:
        num_rows, num_columns = self.shape
        if self.crow_indices is None and self.col_indices is None:
            if math.prod(self.shape) != num_cells:
                raise InvalidRequest(f"{name}: {num_cells} ids do not fill the shape {list(self.shape)}")
            return
        if self.crow_indices is None or self.col_indices is None:
            raise InvalidRequest(f"{name}: a sparse table has both sparse_crow_indices and sparse_col_indices")
        if len(self.crow_indices) != 8 * (num_rows + 1) or len(self.col_indices) != 8 * num_cells:
            raise InvalidRequest(
                f"{name}: a sparse table of {num_rows} rows and {num_cells} ids has {num_rows + 1} sparse_crow_indices "
                f"and {num_cells} sparse_col_indices"
            )
        ends = np.frombuffer(self.crow_indices, dtype="<i8")
        # Compared, not subtracted: a difference of two int64 may overflow.
        if ends[0] != 0 or ends[-1] != num_cells or bool((ends[1:] < ends[:-1]).any()):
            raise InvalidRequest(f"{name}: sparse_crow_indices must rise from 0 to {num_cells}, the number of ids")
        columns = np.frombuffer(self.col_indices, dtype="<i8")
        if columns.size and (columns.min() < 0 or columns.max() >= num_columns):
            raise InvalidRequest(f"{name}: sparse_col_indices must be 0 to {num_columns - 1}")


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a checked table: row and id of each, int64 [cells], rows ascending."""

    rows: NDArray[np.int64]
    token_ids: NDArray[np.int64]


def cells(targets: PromptTargets) -> Cells:
    """The cells in the order of token_ids."""
    return Cells(rows=targets.rows(), token_ids=targets.ids().astype(np.int64))
