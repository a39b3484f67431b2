"""Dead letters: jobs that were set aside because they killed the gang, kept with their bodies until somebody decides."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec
import structlog

from gradstream.engine.files import DRAFT_SUFFIX, sync_directory
from gradstream.shared import codec
from gradstream.shared.errors import GradstreamError, StorageFailure
from gradstream.shared.ids import FutureId, OwnerId, TenantId
from gradstream.shared.wire import Failed, Job

DEAD = "dead"
_SUFFIX = ".letter"
_LOCK = ".lock"
_VERSION = 1
_DIRECTORY_MODE = 0o700
# NAME_MAX is 255 nearly everywhere.
_MAX_NAME_BYTES = 200
_MAX_HEAD_BYTES = 64 * 1024

_log = structlog.get_logger(__name__)


class Letter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is kept of a job beside its body: the first line of its file, JSON.

    starts: how many gangs died while it ran. at_ms: when it was set aside. num_bytes, digest: of the payload, which follows as a zstd
    frame; num_bytes 0: the body was gone already. retried_as: the future of its newest retry, noted before that was submitted.
    """

    v: int
    future_id: FutureId
    owner: OwnerId
    seq: int
    op: str
    tenant: TenantId
    num_tokens: int
    starts: int
    at_ms: int
    error: Failed
    num_bytes: int
    digest: str
    retried_as: FutureId | None = None
    retried_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """letters: those that can be read, oldest first. problems: what is wrong with the other files."""

    letters: list[Letter]
    problems: list[str]


class DeadLetters:
    """The files below {output_dir}/dead. Of the letters at most max_letters are kept, of max_bytes together; the oldest go first.

    put is for the leader; the rest is for tools, beside a running gang or without one.
    """

    def __init__(self, output_dir: Path, *, max_letters: int = 1000, max_bytes: int = 1024**3) -> None:
        self.directory = output_dir / DEAD
        self._max_letters = max_letters
        self._max_bytes = max_bytes

    def put(self, job: Job, outcome: Failed, *, starts: int, at_ms: int) -> bool:
        """Keep a job that is being set aside; one that is kept already stays as it is. False, and a line in the log, when the disk refuses:
        the job's outcome must not depend on it.
        """
        letter = Letter(
            v=_VERSION,
            future_id=job.future_id,
            owner=job.owner,
            seq=job.seq,
            op=job.op,
            tenant=job.tenant,
            num_tokens=job.num_tokens,
            starts=starts,
            at_ms=at_ms,
            error=outcome,
            num_bytes=len(job.payload),
            digest=codec.digest(job.payload),
        )
        try:
            self._make_directory()
            if self._path(job.future_id).exists():
                return True
            _write(self._path(job.future_id), letter, codec.compress(job.payload))
            self._make_room(job.future_id)
        except OSError as error:
            _log.error("dead_letter_not_kept", future_id=job.future_id, reason=str(error))
            return False
        _log.warning("dead_letter", future_id=job.future_id, op=job.op, starts=starts, num_bytes=len(job.payload))
        return True

    def survey(self) -> Survey:
        """All letters, without their bodies."""
        letters, problems = [], []
        for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
            try:
                letters.append(_head(path))
            except FileNotFoundError:
                continue
            except StorageFailure as failure:
                problems.append(failure.message)
        return Survey(letters=sorted(letters, key=lambda letter: letter.at_ms), problems=problems)

    def letter(self, future_id: FutureId) -> Letter | None:
        """A job's letter, None when there is none. Raises StorageFailure when it does not read."""
        try:
            return _head(self._path(future_id))
        except FileNotFoundError:
            return None

    def payload(self, letter: Letter) -> bytes:
        """The job's body as the client's request made it. Raises StorageFailure when it does not read, or was gone."""
        path = self._path(letter.future_id)
        if not letter.num_bytes:
            raise StorageFailure(f"the body of {letter.future_id} was gone from Redis when the job was set aside")
        try:
            with path.open("rb") as file:
                file.readline(_MAX_HEAD_BYTES)
                body = codec.decompress(file.read(), max_bytes=letter.num_bytes)
        except (OSError, GradstreamError) as error:
            raise StorageFailure(f"{path} cannot be read: {error}") from error
        if codec.digest(body) != letter.digest:
            raise StorageFailure(f"{path} is damaged: the body does not have the digest of the first line")
        return body

    def note_retry(self, letter: Letter, *, future_id: FutureId, at_ms: int) -> Letter:
        """Write into a letter which job is its retry. Raises StorageFailure."""
        noted = msgspec.structs.replace(letter, retried_as=future_id, retried_ms=at_ms)
        path = self._path(letter.future_id)
        try:
            with path.open("rb") as file:
                file.readline(_MAX_HEAD_BYTES)
                body = file.read()
            _write(path, noted, body)
        except OSError as error:
            raise StorageFailure(f"{path} cannot be written: {error.strerror}") from error
        return noted

    def drop(self, future_id: FutureId) -> bool:
        """Remove a job's letter, readable or not; True when there was one. Raises StorageFailure."""
        path = self._path(future_id)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageFailure(f"{path} cannot be removed: {error.strerror}") from error
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One retry or drop at a time, over all processes. Raises StorageFailure."""
        try:
            self._make_directory()
            descriptor = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageFailure(f"{self.directory} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)

    def _path(self, future_id: FutureId) -> Path:
        name = quote(future_id, safe="")
        if len(name) > _MAX_NAME_BYTES:
            name = f"{name[:100].rpartition('%')[0]}-{codec.digest(future_id.encode())}"
        return self.directory / f"{name}{_SUFFIX}"

    def _make_room(self, newest: FutureId) -> None:
        """Remove the oldest letters beyond the bounds; the newest stays, whatever its size."""
        spare = self._path(newest)
        found = [(path.stat(), path) for path in self.directory.glob(f"*{_SUFFIX}") if path != spare]
        found.sort(key=lambda item: item[0].st_mtime_ns)
        num_letters = len(found) + 1
        num_bytes = sum(stat.st_size for stat, _ in found) + spare.stat().st_size
        for stat, path in found:
            if num_letters <= self._max_letters and num_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            num_letters -= 1
            num_bytes -= stat.st_size
            _log.warning("dead_letter_gone", file=path.name, reason="the newer ones fill the room for dead letters")


def _write(path: Path, letter: Letter, body: bytes) -> None:
    """Replace path at once by a letter that only the owner may read (mkstemp makes it so). Raises OSError."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=DRAFT_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(letter) + b"\n")
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(draft).unlink()
        raise
    sync_directory(path.parent)


def _head(path: Path) -> Letter:
    """The first line. Raises FileNotFoundError, StorageFailure."""
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_HEAD_BYTES)
        letter = msgspec.json.decode(line, type=Letter)
    except FileNotFoundError:
        raise
    except (OSError, msgspec.DecodeError) as error:
        raise StorageFailure(f"{path} is no dead letter that can be read: {error}") from error
    if letter.v > _VERSION:
        raise StorageFailure(f"{path} has format {letter.v}, and this gradstream reads up to {_VERSION}")
    return letter
