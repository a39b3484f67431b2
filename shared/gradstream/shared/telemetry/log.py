"""Structured logs of one process: readable lines on a terminal, JSON lines everywhere else."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog
from structlog.typing import Processor

# Bodies, prompts and keys are never logged; a field of such a name is a slip and loses its value.
_PRIVATE = frozenset(
    {"api_key", "authorization", "body", "password", "payload", "prompt", "redis_url", "text", "tokens"}
)
_HIDDEN = "[not logged]"


def setup_logging(*, process: str, level: str, stream: TextIO | None = None, **bound: str | int) -> None:
    """Send every log event of this process, those of libraries included, to stream (default stderr).

    process and bound (rank, epoch, ...) are fields of each event. level: DEBUG, INFO, WARNING or ERROR. Call it once, first thing in
    a process; calling it again replaces what the earlier call set up.
    """
    sink = stream or sys.stderr
    shared = _shared({"process": process, **bound})
    renderer: Processor
    if sink.isatty():
        # Plain tracebacks: the default one prints local variables, and those hold bodies.
        renderer = structlog.dev.ConsoleRenderer(pad_event_to=28, exception_formatter=structlog.dev.plain_traceback)
    else:
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)


def _shared(bound: dict[str, str | int]) -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _Bound(bound),
        _hide_private,
    ]


class _Bound:
    """Adds fields that are the same for the whole process."""

    def __init__(self, fields: dict[str, str | int]) -> None:
        self._fields = fields

    # Any: structlog's own event type.
    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for name, value in self._fields.items():
            event.setdefault(name, value)
        return event


def _hide_private(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in _PRIVATE & event.keys():
        event[name] = _HIDDEN
    return event
