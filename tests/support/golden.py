"""The recorded run in tests/golden, and copies of it in which something is changed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
from typer.testing import CliRunner, Result

from gradstream.shared import codec
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId
from gradstream.shared.wire import Outcome
from gradstream.worker import cli_bisect, cli_replay
from gradstream.worker.disklog import framing
from gradstream.worker.disklog.archive import archive_frames
from gradstream.worker.disklog.frames import LoggedBatch, LoggedOutcome, SegmentHead, Selection
from gradstream.worker.disklog.framing import AnyFrame
from gradstream.worker.replaying.report import ReplayReport

GOLDEN = Path(__file__).parents[1] / "golden" / "run.gslog"
MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen3-shakespeare"
FIRST, SECOND = "golden:train:1", "golden:train:2"
SOURCE = ["--log", str(GOLDEN), "--model-path", str(MODEL)]

_RUNNER = CliRunner()


def source(file: Path) -> list[str]:
    """The options that name an exported log of the tiny model."""
    return ["--log", str(file), "--model-path", str(MODEL)]


def replay(*arguments: str) -> Result:
    """`gradstream replay` in this process."""
    return _RUNNER.invoke(cli_replay.app, [str(argument) for argument in arguments])


def bisect(*arguments: str) -> Result:
    """`gradstream bisect` in this process."""
    return _RUNNER.invoke(cli_bisect.app, [str(argument) for argument in arguments])


def replayed(*arguments: str, status: int = 0) -> ReplayReport:
    """The report of a replay that ends with this status."""
    result = replay(*arguments, "--json")
    assert result.exit_code == status, result.output
    return msgspec.json.decode(result.stdout, type=ReplayReport)


def found(*arguments: str, status: int = 0) -> SimpleNamespace:
    """What a search that ends with this status says: the fields of a Finding, with rows as such and the job as plain JSON."""
    result = bisect(*arguments, "--json")
    assert result.exit_code == status, result.output
    fields = json.loads(result.stdout)
    rows = {name: fields[name] and SimpleNamespace(**fields[name]) for name in ("before", "after")}
    return SimpleNamespace(**(fields | rows))


def golden_fingerprint() -> str:
    """Of the engine that recorded the run."""
    return next(frame.fingerprint for frame in archive_frames(GOLDEN) if isinstance(frame, SegmentHead))


def batch_of(future_id: str) -> BatchId:
    """The batch of the run in which a job was executed; which jobs came together depends on the machine that recorded it."""
    batches = [frame for frame in archive_frames(GOLDEN) if isinstance(frame, LoggedBatch)]
    return next(one.batch_id for one in batches if any(job.future_id == future_id for job in one.outcomes))


def changed(target: Path, change: Callable[[AnyFrame], AnyFrame]) -> Path:
    """A copy of the run with every frame changed."""
    frames = list(archive_frames(GOLDEN))
    salt = next(frame.salt for frame in frames if isinstance(frame, Selection))
    packed = [framing.pack(change(frame), salt=0 if isinstance(frame, Selection) else salt) for frame in frames]
    target.write_bytes(b"".join(packed))
    return target


def with_fingerprint(**facts: str) -> Callable[[AnyFrame], AnyFrame]:
    """A change: the run as an engine with other facts would have written it."""
    parts = dict(part.split("=", 1) for part in golden_fingerprint().split()) | facts
    text = " ".join(f"{name}={value}" for name, value in parts.items())

    def change(frame: AnyFrame) -> AnyFrame:
        return msgspec.structs.replace(frame, fingerprint=text) if isinstance(frame, SegmentHead) else frame

    return change


def with_outcome(future_id: str, edit: Callable[[Outcome], Outcome]) -> Callable[[AnyFrame], AnyFrame]:
    """A change: one job was recorded with another outcome."""

    def edited(one: LoggedOutcome) -> LoggedOutcome:
        if one.future_id != FutureId(future_id):
            return one
        data = codec.encode(edit(codec.decode_outcome(one.data)))
        return msgspec.structs.replace(one, data=data, digest=codec.digest(data))

    def change(frame: AnyFrame) -> AnyFrame:
        if not isinstance(frame, LoggedBatch):
            return frame
        return msgspec.structs.replace(frame, outcomes=[edited(one) for one in frame.outcomes])

    return change


def with_batch(batch: BatchId, edit: Callable[[LoggedBatch], LoggedBatch]) -> Callable[[AnyFrame], AnyFrame]:
    """A change: one batch was recorded otherwise."""

    def change(frame: AnyFrame) -> AnyFrame:
        return edit(frame) if isinstance(frame, LoggedBatch) and frame.batch_id == batch else frame

    return change
