"""Log files that stay below a size."""

import shutil
from contextlib import suppress
from pathlib import Path

MAX_LOG_BYTES = 64 * 1024 * 1024
KEPT_LOGS = 3


def rotate(path: Path, *, max_bytes: int = MAX_LOG_BYTES, num_kept: int = KEPT_LOGS) -> bool:
    """Begin a log anew when it is larger than max_bytes; True when it was.

    What it held goes to NAME.1, what NAME.1 held to NAME.2, up to num_kept. The file itself is copied and emptied, not renamed, since the
    process that writes to it keeps it open (for appending, so it goes on at the new end); lines of the instant between the two are lost.
    """
    with suppress(FileNotFoundError):
        if path.stat().st_size <= max_bytes:
            return False
        for number in range(num_kept - 1, 0, -1):
            with suppress(FileNotFoundError):
                _old(path, number).replace(_old(path, number + 1))
        shutil.copyfile(path, _old(path, 1))
        with path.open("r+b") as log:
            log.truncate()
        return True
    return False


def _old(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
