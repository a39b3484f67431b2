"""How often a gang died while it replayed a batch, so that one bad batch does not end every gang for ever."""

from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from gradstream.shared.joblog.port import BatchId

MAX_DEATHS = 5

_log = structlog.get_logger(__name__)


class _Note(msgspec.Struct):
    """batch: the one that is being replayed. num_deaths: of gangs during it. refused: batches that ended too many."""

    batch: str = ""
    num_deaths: int = 0
    refused: list[str] = []


class Attempts:
    """A note in a file of the batch that is being replayed, which outlives a gang that dies of it.

    It is written without a sync: a power cut forgets it, and kills no gang. A disk that refuses it makes a death uncounted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._read()
        self._refused = list(self._before.refused)

    def begin(self, batch: BatchId) -> str | None:
        """Note that the batch is about to be replayed; why it must not be, when too many gangs died of it."""
        num_deaths = self._before.num_deaths if self._before.batch == str(batch) else 0
        if num_deaths >= MAX_DEATHS and str(batch) not in self._refused:
            self._refused.append(str(batch))
        if str(batch) in self._refused:
            self._write(_Note(refused=self._refused))
            return f"the worker died {MAX_DEATHS} times while repeating it"
        self._write(_Note(batch=str(batch), num_deaths=num_deaths + 1, refused=self._refused))
        return None

    def end(self) -> None:
        """The replay is over: what was refused stays refused, for as long as it is in the log."""
        self._write(_Note(refused=self._refused))

    def _write(self, note: _Note) -> None:
        draft = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(note))
            draft.rename(self._path)
        except OSError as error:
            _log.warning("attempt_not_noted", reason=str(error))

    def _read(self) -> _Note:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._path.read_bytes(), type=_Note)
        return _Note()
