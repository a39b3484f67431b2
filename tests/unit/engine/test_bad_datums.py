"""Bad training input fails its job, names the field and changes nothing."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data

from gradstream.shared.columns import Column
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import Batch, Failed, ForwardBackward, ForwardBackwardDone, Plan


def _base() -> ForwardBackward:
    return cross_entropy(random_data([4, 6]))


def _with(name: str, column: Column) -> ForwardBackward:
    base = _base()
    return msgspec.structs.replace(base, inputs={**base.inputs, name: column})


def _without(name: str) -> ForwardBackward:
    base = _base()
    return msgspec.structs.replace(base, inputs={key: value for key, value in base.inputs.items() if key != name})


def _ids(values: list[list[int]], dtype: str = "int64") -> Column:
    return Column.of([np.array(value) for value in values], dtype=dtype)  # type: ignore[arg-type]


def _weights(first: float) -> Column:
    return Column.of([np.array([first, 1, 1, 1]), np.ones(6)], dtype="float32")


CASES: dict[str, tuple[Callable[[], ForwardBackward], str]] = {
    "token above the vocabulary": (
        lambda: msgspec.structs.replace(_base(), tokens=_ids([[1, 2, 3, 2048], [1] * 6], "int32")),
        "tokens: token id 2048 is outside the vocabulary, 0 to 2047",
    ),
    "negative target": (lambda: _with("target_tokens", _ids([[1, -1, 1, 1], [1] * 6])), "token id -1"),
    "targets of other lengths": (
        lambda: _with("target_tokens", _ids([[1] * 6, [1] * 4])),
        "target_tokens: its lengths",
    ),
    "no targets": (lambda: _without("target_tokens"), "target_tokens is missing"),
    "float targets": (lambda: _with("target_tokens", _weights(1.0)), "dtype float32 is not int32 or int64"),
    "nan weight": (lambda: _with("weights", _weights(float("nan"))), "weights: holds nan or inf"),
    "inf weight": (lambda: _with("weights", _weights(float("inf"))), "weights: holds nan or inf"),
    "integer weights": (lambda: _with("weights", _ids([[1] * 4, [1] * 6])), "weights: dtype int64"),
    "unknown input": (lambda: _with("advantages", _weights(1.0)), "no input advantages"),
    "unknown loss": (lambda: msgspec.structs.replace(_base(), loss_fn="crossentropy"), "'crossentropy' is not known"),
    "unknown parameter": (lambda: msgspec.structs.replace(_base(), loss_config={"beta": 1.0}), "has no beta"),
    "no datum": (lambda: cross_entropy(random_data([])), "holds no datum"),
    "empty datum": (lambda: cross_entropy(random_data([3, 0])), "datum 1 is empty"),
    "too long": (lambda: cross_entropy(random_data([1025])), "datum 0 has 1025 tokens"),
    "truncated data": (
        lambda: msgspec.structs.replace(
            _base(), tokens=Column(dtype="int32", lengths=_base().tokens.lengths, data=b"\0" * 39)
        ),
        "39 bytes of int32",
    ),
    "negative length": (
        lambda: msgspec.structs.replace(
            _base(),
            tokens=Column(dtype="int32", lengths=np.array([12, -2], dtype="<i8").tobytes(), data=b"\0" * 40),
        ),
        "negative",
    ),
}


@pytest.fixture(scope="module")
def driver() -> Driver:
    driver = Driver(open_engine())
    driver.create("m")
    driver.create("n")
    return driver


@pytest.mark.parametrize("case", CASES)
def test_bad_input_fails_its_own_job_only(case: str, driver: Driver) -> None:
    make, text = CASES[case]
    before = driver.grad("m")
    bad, good = driver.run(("m", make()), ("n", _base()))
    assert isinstance(bad, Failed)
    assert bad.code == "invalid_request"
    assert text in bad.message
    assert (driver.grad("m") == before).all()
    assert isinstance(good, ForwardBackwardDone)


def test_bytes_that_are_no_payload_fail_their_job_only(driver: Driver) -> None:
    job = driver._job("m", _base(), "local")  # type: ignore[arg-type]
    broken = msgspec.structs.replace(job, future_id=FutureId("m:9"), payload=job.payload[:-3])
    plan = Plan(kind="forward_backward", future_ids=[job.future_id], row_budget_tokens=100)
    bad, good = driver.engine.execute(Batch(number=1, epoch=1, plan=plan, jobs=[broken, job])).values()
    assert isinstance(bad, Failed)
    assert bad.code == "invalid_request"
    assert isinstance(good, ForwardBackwardDone)
