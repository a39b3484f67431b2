"""Resolved settings on their way from the launcher to its processes: a JSON file only the user can read."""

import os
from pathlib import Path

import msgspec

from gradstream.shared.config.problems import ConfigError, Problem
from gradstream.shared.config.settings import Settings

_PRIVATE = 0o600


def to_json(settings: Settings) -> bytes:
    """All fields, as JSON with two spaces of indent."""
    return msgspec.json.format(msgspec.json.encode(settings, order="sorted"), indent=2)


def from_json(data: bytes) -> Settings:
    """The settings that to_json wrote. Raises ConfigError."""
    try:
        return msgspec.json.decode(data, type=Settings)
    except msgspec.DecodeError as error:
        raise ConfigError([Problem("", f"not the settings of this version: {error}")]) from error


def write_handover(settings: Settings, path: Path) -> None:
    """Replace path by the settings at once; only the owner may read it, since redis_url can hold a password."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
    with os.fdopen(descriptor, "wb") as sink:
        sink.write(to_json(settings))
    draft.replace(path)


def read_handover(path: Path) -> Settings:
    """The settings in a file that write_handover made. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([Problem(str(path), f"cannot be read: {error.strerror}")]) from error
    return from_json(data)
