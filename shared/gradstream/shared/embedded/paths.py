"""Files of the embedded server: lock, socket, password, log."""

import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

# sun_path holds 108 bytes on Linux and 104 on macOS, the closing zero included.
_MAX_SOCKET_PATH_BYTES = 103
_MAX_LOG_BYTES = 16 * 1024**2


class DataDirInUse(Exception):
    """Another server runs on the same data directory."""


def lock_data_dir(data_dir: Path) -> int:
    """A descriptor that holds the data directory's lock. Its copies in child processes hold it too.

    Raises DataDirInUse: two servers on one directory would lose acknowledged writes.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise DataDirInUse(
            f"a queue server already runs on {data_dir} (started by process {holder}); stop it, or choose another data directory"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def socket_path(data_dir: Path) -> Path:
    """Where the Unix socket goes: into data_dir, or into a short private directory when that path is too long."""
    path = data_dir.resolve() / "redis.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    name = hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"gradstream-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a directory that belongs to this user alone (mode 0700)")
    return folder / "redis.sock"


def remove_unfinished(data_dir: Path) -> None:
    """Take away what a server that was killed had begun to write and would never have read: each left up to the size of its memory."""
    for path in [*data_dir.glob("temp-*"), *data_dir.glob("appendonlydir/temp-*")]:
        path.unlink(missing_ok=True)


def remove_socket(data_dir: Path) -> None:
    """Take away the socket of a stopped server, and its short directory if it had one."""
    socket = socket_path(data_dir)
    socket.unlink(missing_ok=True)
    if socket.parent != data_dir.resolve():
        socket.parent.rmdir()


def password(data_dir: Path) -> str:
    """The loopback server's password, made at first use."""
    path = data_dir / "password"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text().strip()


def rotate(log_file: Path) -> None:
    """Move a large log aside; one old one is kept."""
    if log_file.exists() and log_file.stat().st_size > _MAX_LOG_BYTES:
        log_file.replace(log_file.with_name(f"{log_file.name}.1"))


def tail(log_file: Path, *, num_lines: int = 5) -> str:
    """The last lines of a log, for an error message."""
    if not log_file.exists():
        return "(no log was written)"
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-num_lines:])


def write_private(path: Path, text: str) -> None:
    """Replace path by a file that only this user can read."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)
