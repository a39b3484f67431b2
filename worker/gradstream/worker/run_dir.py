"""The launcher's files below output_dir: its lock, the settings it hands down, the logs of its processes."""

import fcntl
import os
import secrets
from pathlib import Path
from typing import Self


class OutputDirInUse(Exception):
    """Another launcher works in the same output_dir."""


class RunDir:
    """Holds output_dir for one launcher while it is open.

    logs/NAME.log: what each process says. run/settings.json: the resolved settings (mode 0600). run/lock: names the holder's pid.
    run/owner: the launchers' lease token; it outlives them, so that the gang of a new launcher need not wait for the lease of a killed one.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.settings_file = output_dir / "run" / "settings.json"
        self.log_dir = output_dir / "logs"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log_file(self, name: str) -> Path:
        return self.log_dir / f"{name}.log"

    def owner(self) -> str:
        """The lease token of the launchers of this directory, of which only one runs at a time."""
        path = self.settings_file.with_name("owner")
        if not path.exists():
            draft = path.with_name(".owner")
            draft.write_text(f"launcher-{secrets.token_hex(8)}\n", encoding="ascii")
            draft.replace(path)
        return path.read_text(encoding="ascii").strip()

    def open(self) -> None:
        """Make the directories and take the lock. Raises OutputDirInUse, or OSError when the directory cannot be used."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.settings_file.parent.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(self.settings_file.with_name("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise OutputDirInUse(
                f"output_dir: {self.output_dir} is in use by another gradstream server (process {holder}); "
                "stop that one, or set another output_dir"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def close(self) -> None:
        """Remove the settings, which may hold a password, and free the directory."""
        self.settings_file.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
