"""Directories and files that appear whole or not at all."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradstream.shared.errors import StorageFailure

DIRECTORY_MODE = 0o755
FILE_MODE = 0o644
# What crashed writers leave has this suffix and is never read.
DRAFT_SUFFIX = ".tmp"

# renameat2(2) on Linux.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}


class Revoked(Exception):
    """The place where drafts are made was taken away: another gang has taken over. The process must end."""


@contextmanager
def whole_directory(target: Path, *, replace: bool = False, draft_in: Path | None = None) -> Iterator[Path]:
    """Yield an empty directory that becomes target when the block ends without an error.

    Everything in it is made readable (0644/0755) and synced before the rename, and the parent is synced after it, so a crash at
    any instant leaves either no target (or the old one) or a complete one. With replace an existing target is exchanged in one
    step where the file system can, and removed last. Leftovers of crashed writers carry the suffix `.tmp` and are never read.
    draft_in: an existing directory of the same file system to make the draft in, beside target if None. Once it is removed or
    renamed, no draft in it becomes a target any more.
    Raises FileExistsError when target exists and replace is false, StorageFailure when the file system refuses, Revoked when
    draft_in is gone.
    """
    folder = draft_in or target.parent
    with _unless_revoked(draft_in), storage_errors(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not replace:
            raise FileExistsError(target)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=DRAFT_SUFFIX, dir=folder))
    try:
        with _unless_revoked(draft_in), storage_errors(f"cannot write {target}"):
            yield draft
            _settle(draft)
            _publish(draft, target, replace=replace)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def _unless_revoked(draft_in: Path | None) -> Iterator[None]:
    try:
        yield
    except StorageFailure as failure:
        if draft_in is not None and not draft_in.is_dir():
            raise Revoked(f"{draft_in} is gone: another gang has taken over, or somebody removed it") from failure
        raise


def write_whole_file(target: Path, data: bytes) -> None:
    """Make a file that does not exist yet appear with its content and survive a power cut; its directory exists.

    A crash leaves no target or all of it. Raises FileExistsError, StorageFailure.
    """
    with storage_errors(f"cannot write {target}"):
        if target.exists():
            raise FileExistsError(target)
        descriptor, draft = tempfile.mkstemp(prefix=f".{target.name}.", suffix=DRAFT_SUFFIX, dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), FILE_MODE)
                os.fsync(file.fileno())
            Path(draft).rename(target)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(draft).unlink()
            raise
        sync_directory(target.parent)


def make_directories(target: Path) -> None:
    """Make target and its parents, those that are missing, in a way that survives a power cut. Raises OSError."""
    if target.is_dir():
        return
    make_directories(target.parent)
    target.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    sync_directory(target.parent)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the block into StorageFailure(`what: reason`); FileExistsError passes."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise StorageFailure(f"{what}: {reason}") from error


def mark_used(directory: Path) -> None:
    """Set the directory's time of change to now, which says when it was used last. One that is gone stays gone."""
    with suppress(FileNotFoundError, PermissionError):
        os.utime(directory)


def sync_directory(directory: Path) -> None:
    """Make renames inside directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(draft: Path) -> None:
    """Fix modes and sync every file and directory below draft, the deepest first."""
    for root, _, names in os.walk(draft, topdown=False):
        for name in names:
            path = Path(root, name)
            path.chmod(FILE_MODE)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        Path(root).chmod(DIRECTORY_MODE)
        sync_directory(Path(root))


def _publish(draft: Path, target: Path, *, replace: bool) -> None:
    """Give draft the name target; the directory that had it, if any, is removed."""
    if replace and target.exists() and _swap(draft, target):
        sync_directory(target.parent)
        shutil.rmtree(draft, ignore_errors=True)
        return
    try:
        # rename(2) replaces an empty directory silently; what is published here is never empty, so a race ends in ENOTEMPTY.
        draft.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(target) from error
        raise
    sync_directory(target.parent)


def _swap(draft: Path, target: Path) -> bool:
    """Give draft the name of target and the other way round; False when target was removed meanwhile."""
    try:
        if not _exchange(draft, target):
            _swap_in_two_steps(draft, target)
    except FileNotFoundError:
        return False
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the C library or the file system cannot (NFS, macOS)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _swap_in_two_steps(draft: Path, target: Path) -> None:
    """Swap by way of a third name. A crash between the two renames leaves the old directory under a name ending in .old.tmp."""
    # Beside target: what is in the place of drafts may be taken away.
    aside = target.with_name(draft.name.removesuffix(".tmp") + ".old.tmp")
    target.rename(aside)
    try:
        draft.rename(target)
    except BaseException:
        with suppress(OSError):
            aside.rename(target)
        raise
    aside.rename(draft)
