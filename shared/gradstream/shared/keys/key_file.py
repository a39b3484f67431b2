"""The file of key hashes: read whole, replaced whole, private to its owner."""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from gradstream.shared.keys.api_key import StoredKey, is_valid_tenant

_VERSION = 1
_PRIVATE = 0o600
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MAX_BYTES = 16 * 1024**2

Keys = tuple[StoredKey, ...]


class KeyFileError(Exception):
    """The file cannot be used; str() names it and says why."""


class _Content(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    keys: list[StoredKey]


def read_keys(path: Path) -> Keys:
    """The keys in the file, in order of making. Raises FileNotFoundError when there is none, else KeyFileError."""
    try:
        with path.open("rb") as source:
            mode = os.fstat(source.fileno()).st_mode
            data = source.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror})") from error
    if mode & _OTHERS_WRITE:
        raise KeyFileError(f"{path}: other users may write it, and so let themselves in; run: chmod 600 {path}")
    if len(data) > _MAX_BYTES:
        raise KeyFileError(f"{path}: more than {_MAX_BYTES} bytes")
    return _parsed(data, path)


def change_keys(path: Path, change: Callable[[Keys], Sequence[StoredKey]]) -> None:
    """Replace the file's keys by what change makes of them, atomically and alone; a missing file counts as empty.

    Raises KeyFileError, or what change raises; then the file stays as it was.
    """
    try:
        with _alone(path):
            try:
                before = read_keys(path)
            except FileNotFoundError:
                before = ()
            _replace(path, change(before))
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be written ({error.strerror})") from error


def _parsed(data: bytes, path: Path) -> Keys:
    try:
        content = msgspec.json.decode(data, type=_Content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeyFileError(f"{path}: is no key file of gradstream ({error})") from error
    if content.version != _VERSION:
        raise KeyFileError(f"{path}: version {content.version}; this gradstream reads version {_VERSION}")
    if bad := [key.tenant for key in content.keys if not is_valid_tenant(key.tenant)]:
        raise KeyFileError(f"{path}: {bad[0][:80]!r} is no tenant's name")
    if len({key.key_id for key in content.keys}) < len(content.keys):
        raise KeyFileError(f"{path}: two keys have the same id")
    return tuple(content.keys)


def _replace(path: Path, keys: Sequence[StoredKey]) -> None:
    """Durable before it is visible."""
    data = msgspec.json.format(msgspec.json.encode(_Content(version=_VERSION, keys=list(keys))), indent=1)
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE)
    with os.fdopen(descriptor, "wb") as sink:
        sink.write(data + b"\n")
        sink.flush()
        os.fsync(sink.fileno())
    draft.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock that every change of the file takes."""
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
