"""Log events of a process: one JSON object a line, with its bound fields and without private ones."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog

from gradstream.shared.telemetry.log import setup_logging


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def events(sink: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in sink.getvalue().splitlines()]


def test_an_event_is_one_json_line_with_the_fields_of_its_process() -> None:
    sink = io.StringIO()
    setup_logging(process="rank0", level="INFO", stream=sink, epoch=3)
    structlog.get_logger("gradstream.test").info("batch_done", num_jobs=2)
    (event,) = events(sink)
    assert event.pop("timestamp")
    assert event == {
        "event": "batch_done", "num_jobs": 2, "process": "rank0", "epoch": 3, "level": "info", "logger": "gradstream.test",
    }  # fmt: skip


def test_events_below_the_level_are_left_out() -> None:
    sink = io.StringIO()
    setup_logging(process="api", level="WARNING", stream=sink)
    structlog.get_logger("a").info("quiet")
    logging.getLogger("b").info("quiet")
    structlog.get_logger("a").warning("loud")
    assert [event["event"] for event in events(sink)] == ["loud"]


def test_libraries_and_warnings_speak_the_same_format() -> None:
    sink = io.StringIO()
    setup_logging(process="api", level="INFO", stream=sink)
    logging.getLogger("uvicorn").info("hello %s", "you", extra={"port": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", UserWarning, stacklevel=1)
    hello, old = events(sink)
    assert (hello["event"], hello["port"], hello["process"]) == ("hello you", 5, "api")
    assert old["level"] == "warning"
    assert "old" in str(old["event"])


def test_an_exception_stays_on_its_line() -> None:
    sink = io.StringIO()
    setup_logging(process="api", level="INFO", stream=sink)
    try:
        raise ValueError("broken")  # noqa: TRY301 - raised to be logged
    except ValueError:
        structlog.get_logger("a").exception("failed")
    (event,) = events(sink)
    assert "ValueError: broken" in str(event["exception"])


@pytest.mark.parametrize("name", ["body", "prompt", "tokens", "api_key", "redis_url"])
def test_a_private_field_loses_its_value(name: str) -> None:
    sink = io.StringIO()
    setup_logging(process="api", level="INFO", stream=sink)
    structlog.get_logger("a").info("slip", **{name: "secret"})
    assert "secret" not in sink.getvalue()


def test_setting_up_again_replaces_the_first_set_up() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging(process="a", level="INFO", stream=first)
    setup_logging(process="b", level="INFO", stream=second)
    structlog.get_logger("x").info("once")
    assert (first.getvalue(), len(events(second))) == ("", 1)


def test_a_terminal_gets_readable_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    sink = Terminal()
    setup_logging(process="launcher", level="INFO", stream=sink)
    structlog.get_logger("x").info("ready", port=5555)
    assert "ready" in sink.getvalue()
    assert not sink.getvalue().startswith("{")
