"""How often a gang died while it replayed a batch, so that one bad batch does not end every gang for ever."""

from contextlib import suppress
from pathlib import Path

import msgspec

from gradstream.shared.joblog.port import BatchId

MAX_DEATHS = 5


class _Attempt(msgspec.Struct):
    batch: str
    num_deaths: int


class Attempts:
    """A note in a file of the batch that is being replayed, which outlives a gang that dies of it.

    It is written without a sync: a power cut forgets it, and kills no gang.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = self._read()

    def begin(self, batch: BatchId) -> str | None:
        """Note that the batch is about to be replayed; why it must not be, when too many gangs died of it."""
        num_deaths = self._last.num_deaths if self._last is not None and self._last.batch == str(batch) else 0
        if num_deaths >= MAX_DEATHS:
            return f"the worker died {num_deaths} times while repeating it"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(msgspec.json.encode(_Attempt(batch=str(batch), num_deaths=num_deaths + 1)))
        return None

    def end(self) -> None:
        """Forget the note: the replay is over."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> _Attempt | None:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._path.read_bytes(), type=_Attempt)
        return None
