"""Ragged arrays of many datums as one binary column: dtype, lengths and bytes."""

import math
from typing import Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradstream.shared.errors import InvalidRequest

DType = Literal["float32", "int64", "int32", "float64"]
_NUMPY: dict[DType, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
}


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """One named array for each of N datums, stored end to end.

    The array of datum i has shape [lengths[i], *trailing]. data holds the values of all datums, little-endian, row-major;
    lengths holds N int64, little-endian. A column made from the wire is checked by `check`, never trusted.
    """

    dtype: DType
    lengths: bytes
    data: bytes
    trailing: tuple[int, ...] = ()

    @classmethod
    def of(cls, arrays: list[NDArray[np.generic]], *, dtype: DType, trailing: tuple[int, ...] = ()) -> Self:
        """A column that holds a copy of the arrays, each of shape [length, *trailing]."""
        target = _NUMPY[dtype]
        lengths = np.array([array.shape[0] for array in arrays], dtype="<i8")
        data = b"".join([np.ascontiguousarray(array, dtype=target).data for array in arrays])
        return cls(dtype=dtype, lengths=lengths.tobytes(), data=data, trailing=trailing)

    @property
    def num_datums(self) -> int:
        return len(self.lengths) // 8

    @property
    def num_values(self) -> int:
        """Values of all datums."""
        return len(self.data) // _NUMPY[self.dtype].itemsize

    def lengths_array(self) -> NDArray[np.int64]:
        """Rows of each datum, shape [num_datums]; a view."""
        return np.frombuffer(self.lengths, dtype="<i8")

    def values(self) -> NDArray[np.generic]:
        """All values end to end, shape [sum(lengths), *trailing]; a read-only view of data."""
        return np.frombuffer(self.data, dtype=_NUMPY[self.dtype]).reshape(-1, *self.trailing)

    def arrays(self) -> list[NDArray[np.generic]]:
        """One read-only view per datum, shape [length, *trailing]."""
        values = self.values()
        ends = np.cumsum(self.lengths_array())
        return [values[end - length : end] for end, length in zip(ends, self.lengths_array(), strict=True)]

    def check(self, name: str) -> None:
        """Raise InvalidRequest, naming the column, unless lengths, trailing and data agree."""
        if len(self.lengths) % 8:
            raise InvalidRequest(f"{name}: lengths has {len(self.lengths)} bytes; it must hold whole int64 values")
        lengths = self.lengths_array()
        if lengths.size and int(lengths.min()) < 0:
            raise InvalidRequest(f"{name}: a length is {int(lengths.min())}; lengths are counts and cannot be negative")
        if any(size <= 0 for size in self.trailing):
            raise InvalidRequest(f"{name}: trailing shape {list(self.trailing)} has a size below 1")
        if lengths.size and int(lengths.max()) > len(self.data):
            raise InvalidRequest(
                f"{name}: a length is {int(lengths.max())}, but there are {len(self.data)} bytes in all"
            )
        want = int(lengths.sum()) * math.prod(self.trailing) * _NUMPY[self.dtype].itemsize
        if want != len(self.data):
            raise InvalidRequest(
                f"{name}: {len(self.data)} bytes of {self.dtype} do not match its lengths, which need {want}"
            )
