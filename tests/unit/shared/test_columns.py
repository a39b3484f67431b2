"""Ragged arrays as binary columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradstream.shared.columns import Column
from gradstream.shared.errors import InvalidRequest


@given(st.lists(hnp.arrays(np.float32, st.integers(0, 9)), max_size=6))
def test_arrays_come_back_bit_for_bit(arrays: list[np.ndarray]) -> None:
    column = Column.of(arrays, dtype="float32")
    column.check("x")
    assert column.num_datums == len(arrays)
    assert [array.tobytes() for array in column.arrays()] == [array.tobytes() for array in arrays]


def test_a_trailing_shape_is_kept_per_row() -> None:
    arrays = [np.arange(6).reshape(2, 3), np.zeros((0, 3)), np.ones((1, 3))]
    column = Column.of(arrays, dtype="int64", trailing=(3,))
    column.check("x")
    assert [array.shape for array in column.arrays()] == [(2, 3), (0, 3), (1, 3)]
    assert column.arrays()[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_views_are_read_only_and_little_endian() -> None:
    column = Column.of([np.array([1, 256], dtype=">i4")], dtype="int32")
    assert column.data == bytes([1, 0, 0, 0, 0, 1, 0, 0])
    with pytest.raises(ValueError, match="read-only"):
        column.arrays()[0][0] = 9


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (Column(dtype="int32", lengths=b"\x01", data=b""), "whole int64"),
        (Column(dtype="int32", lengths=np.array([-1]).tobytes(), data=b""), "cannot be negative"),
        (Column(dtype="int32", lengths=np.array([2]).tobytes(), data=b"\x00" * 4), "need 8"),
        (Column(dtype="float64", lengths=np.array([1]).tobytes(), data=b"\x00" * 4), "need 8"),
        (Column(dtype="int32", lengths=np.array([1]).tobytes(), data=b"", trailing=(0,)), "size below 1"),
        (Column(dtype="int32", lengths=np.array([2**62, 2**62]).tobytes(), data=b""), "0 bytes in all"),
        (Column(dtype="int32", lengths=np.array([2**62] * 4).tobytes(), data=b""), "0 bytes in all"),
        (Column(dtype="int32", lengths=np.array([1]).tobytes(), data=b"\x00" * 4, trailing=(2**32, 2**32)), "need 7"),
    ],
    ids=["lengths", "negative", "short", "dtype", "trailing", "huge", "sum overflows", "size overflows"],
)
def test_a_column_that_disagrees_with_itself_is_named(column: Column, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"targets: .*({message})"):
        column.check("targets")
