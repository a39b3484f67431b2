"""What can be wrong with a log on disk."""

from pathlib import Path

from gradstream.shared.errors import StorageFailure

_LOG_ADVICE = "`gradstream log verify` shows what is whole; docs/inspect.md says what helps"


class LogDamaged(StorageFailure):
    """A segment is missing, or bytes that were written once no longer read. Never raised for the torn end that a kill leaves."""

    def __init__(self, path: Path, offset: int, reason: str, *, advice: str = _LOG_ADVICE) -> None:
        super().__init__(f"the job log is damaged: {path} at byte {offset}: {reason}. {advice}")
        self.path = path
        self.offset = offset
        self.reason = reason


class NoExport(LogDamaged):
    """A file that `log export` did not make: it does not begin like one."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            0,
            "it does not begin like an exported job log",
            advice="Name a file that `gradstream log export` made",
        )


class UnknownPosition(ValueError):
    """A position that is not on the log: its segment is gone, or a later epoch does not count what stands there."""


class SyncFailed(Exception):
    """The system could not say that what was written is on disk, and will not say so later either.

    The process must end: its successor reads what is really there.
    """
