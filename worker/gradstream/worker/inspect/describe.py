"""Payloads and outcomes in short: shapes, dtypes, settings and metrics instead of tensors."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import Failed, ForwardBackwardDone, OptimStepDone, Outcome, SampleDone

_MAX_ITEMS = 8

# What JSON can hold.
Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


def describe(value: object) -> Plain:
    """value with its arrays as shapes and its bytes as sizes; only the first of many items."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Column():
            return _column(value)
        case bytes() | bytearray() | memoryview():
            return f"{len(value)} bytes"
        case msgspec.Struct():
            fields = {name: describe(getattr(value, name)) for name in value.__struct_fields__}
            tag = value.__struct_config__.tag
            return {**({"type": tag} if isinstance(tag, str) else {}), **fields}
        case Mapping():
            return {str(name): describe(item) for name, item in value.items()}
        case Sequence():
            shown = [describe(item) for item in value[:_MAX_ITEMS]]
            return shown if len(value) <= _MAX_ITEMS else [*shown, f"... and {len(value) - _MAX_ITEMS} more"]
        case _:
            return str(value)


def describe_payload(data: bytes) -> Plain:
    """A job's payload in short; a sentence when it does not read."""
    if not data:
        return "the body was gone from Redis when the job was read"
    try:
        return describe(codec.decode_payload(data))
    except InvalidRequest as error:
        return error.message


def metrics_of(outcome: Outcome) -> dict[str, float]:
    """The metrics of a training job, empty for every other outcome."""
    match outcome:
        case ForwardBackwardDone(metrics=metrics) | OptimStepDone(metrics=metrics):
            return metrics
        case _:
            return {}


def loss_of(outcome: Outcome) -> float | None:
    """The loss that a training job reported: the mean if there is one, else the sum; None for other jobs."""
    metrics = metrics_of(outcome)
    return next((metrics[name] for name in ("loss:mean", "loss:sum", "loss") if name in metrics), None)


def in_short(outcome: Outcome) -> str:
    """What came out, in a few words."""
    match outcome:
        case Failed(code=code, message=message):
            return f"{code}: {message}"
        case SampleDone(sequences=sequences):
            num_tokens = sum(len(sequence.tokens) // 4 for sequence in sequences)
            return f"{len(sequences)} sequence(s), {num_tokens} tokens"
        case _:
            return ", ".join(f"{name}={value:.6g}" for name, value in list(metrics_of(outcome).items())[:4])


def text_lines(value: Plain, *, indent: str = "") -> list[str]:
    """value as indented lines for a person."""
    match value:
        case dict():
            lines: list[str] = []
            for name, item in value.items():
                lines += _named(name, item, indent)
            return lines
        case list():
            return [line for item in value for line in _named("-", item, indent)]
        case _:
            return [f"{indent}{_scalar(value)}"]


def _named(name: str, item: Plain, indent: str) -> list[str]:
    start = f"{indent}-" if name == "-" else f"{indent}{name}:"
    if isinstance(item, dict | list) and item:
        return [start, *text_lines(item, indent=indent + "  ")]
    return [f"{start} {_scalar(item)}"]


def _scalar(value: Plain) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _column(column: Column) -> Plain:
    """One array per datum: how many, of which lengths, and what the values span."""
    lengths = column.lengths_array()
    values = column.values()
    trailing = "".join(f", {size}" for size in column.trailing)
    longest = f"{lengths.min()}..{lengths.max()}" if lengths.size and lengths.min() != lengths.max() else None
    length = longest or (str(lengths[0]) if lengths.size else "0")
    span = {"min": np.nanmin(values).item(), "max": np.nanmax(values).item()} if np.isfinite(values).any() else {}
    num_bad = int(values.size - np.isfinite(values).sum())
    return {
        "dtype": column.dtype,
        "shape": f"{lengths.size} x [{length}{trailing}]",
        "values": int(values.size),
        **span,
        **({"not_finite": num_bad} if num_bad else {}),
    }
