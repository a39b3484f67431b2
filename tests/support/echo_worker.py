"""A worker without an engine: it reads jobs in order from the real feed and answers as a uniform language model would.

Every token has log-probability -ln(V) whatever was trained, which makes every number of an outcome known in advance.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from gradstream.shared import codec
from gradstream.shared.catalog import EngineCard
from gradstream.shared.columns import Column
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import Commit, Ended, LogEntry, RecordKind, RecordWrite
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.wire import (
    CopyCheckpoint,
    CopyCheckpointDone,
    CreateModel,
    CreateModelDone,
    DeleteCheckpoint,
    DeleteCheckpointDone,
    Failed,
    ForwardBackward,
    ForwardBackwardDone,
    Job,
    LoadWeights,
    LoadWeightsDone,
    OffloadModel,
    OffloadModelDone,
    OptimStep,
    OptimStepDone,
    Outcome,
    Plan,
    ResetModel,
    ResetModelDone,
    Sample,
    SampleDone,
    SaveExternal,
    SaveExternalDone,
    SaveForSampler,
    SaveForSamplerDone,
    SaveWeights,
    SaveWeightsDone,
    Sequence,
    TopK,
    UnloadModel,
    UnloadModelDone,
)

_START_S = 60.0
# Names of checkpoints for which there is no room.
FULL_DISK = frozenset({"too-large", "session_too-large_final"})


class EchoWorker:
    """Runs in a thread between start and stop. Between pause and resume it reads nothing, so that jobs pile up."""

    def __init__(self, url: str, *, engine: str, card: EngineCard, output_dir: Path | None = None) -> None:
        self._output_dir = output_dir
        self._feed = RedisFeed(url, engine=engine)
        self._card = card
        self._stop = threading.Event()
        self._paused = threading.Event()
        self._idle = threading.Event()
        self.seen: list[tuple[str, int, str]] = []
        self.loaded: list[str] = []
        self.error: BaseException | None = None
        self._ready = threading.Event()
        # A daemon: a test process never waits at its end for a worker that a failed test left behind.
        self._thread = threading.Thread(target=self._run, name="echo-worker", daemon=True)

    def start(self) -> None:
        """Return once it serves; raises what kept it from that, with nothing left running."""
        self._thread.start()
        if not self._ready.wait(_START_S):
            self._stop.set()
            raise TimeoutError(f"the echo worker was not ready within {_START_S} s")
        self.check()

    def check(self) -> None:
        """Raise what ended it, if anything did."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(_START_S)
        self.check()

    def pause(self) -> None:
        """Return once nothing is being read."""
        self._idle.clear()
        self._paused.set()
        assert self._idle.wait(_START_S), self.error

    def resume(self) -> None:
        self._paused.clear()

    def _run(self) -> None:
        try:
            with self._feed:
                epoch = self._feed.acquire(owner="echo")
                self._feed.publish_card(msgspec.structs.replace(self._card, epoch=epoch), epoch=epoch)
                self._ready.set()
                self._serve(epoch)
                self._feed.release(epoch)
        except BaseException as error:  # noqa: BLE001  handed to the test that stops the worker
            self.error = error
            self._ready.set()

    def _serve(self, epoch: int) -> None:
        cursor, number = self._feed.cursor(), 0
        while not self._stop.is_set():
            self._feed.renew(epoch)
            if self._paused.is_set():
                self._idle.set()
                self._stop.wait(0.01)
                continue
            for entry in self._feed.read(cursor, count=64, block_ms=50):
                if entry.is_open:
                    number += 1
                    self._feed.commit(self._commit(entry, epoch=epoch, number=number))
                cursor = entry.entry_id

    def _commit(self, entry: LogEntry, *, epoch: int, number: int) -> Commit:
        job = entry.job
        self.seen.append((job.owner, job.seq, job.op))
        payload = codec.decode_payload(job.payload)
        outcome = self._outcome(job, payload)
        plan = Plan(kind=job.op, future_ids=[job.future_id], row_budget_tokens=self._card.max_context_tokens)
        return Commit(
            epoch=epoch,
            number=number,
            outcomes=[Ended.of(job, outcome)],
            plan=msgspec.msgpack.encode(plan),
            cursor=entry.entry_id,
            records=list(_records(job, payload, outcome, output_dir=self._output_dir)),
        )

    def _outcome(self, job: Job, payload: object) -> Outcome:  # noqa: PLR0911  one answer per payload
        match payload:
            case CreateModel():
                return CreateModelDone(model_id=ModelId(job.owner))
            case ForwardBackward():
                return self._forward_backward(payload)
            case OptimStep() if payload.adam.learning_rate == 666.0:
                return Failed(code="non_finite", category="user", message="the gradient is not finite")
            case OptimStep():
                return OptimStepDone(metrics={"grad_norm": 0.0})
            case SaveWeights() if payload.name in FULL_DISK:
                return Failed(code="storage_limit", category="server", message="the save needs more room than is left")
            case SaveWeights():
                return SaveWeightsDone(path=f"tinker://{job.owner}/weights/{payload.name}")
            case LoadWeights():
                self.loaded.append(payload.path)
                return LoadWeightsDone(path=payload.path, model_id=ModelId(job.owner))
            case SaveForSampler(name=str(name)):
                return SaveForSamplerDone(path=f"tinker://{job.owner}/sampler_weights/{name}")
            case SaveForSampler():
                return SaveForSamplerDone(sampler_id=payload.sampler_id)
            case SaveExternal():
                return SaveExternalDone(path=f"tinker://{job.owner}/external_weights/{payload.name}", size_bytes=1000)
            case UnloadModel():
                return UnloadModelDone(model_id=ModelId(job.owner))
            case ResetModel():
                return ResetModelDone(model_id=ModelId(job.owner))
            case OffloadModel():
                return OffloadModelDone(model_id=ModelId(job.owner), asleep=payload.asleep, bytes_moved=8)
            case DeleteCheckpoint():
                return DeleteCheckpointDone(path=payload.path)
            case CopyCheckpoint():
                return CopyCheckpointDone(path=payload.path)
            case Sample():
                return self._sample(payload)
            case _:
                raise AssertionError(payload)

    def _forward_backward(self, payload: ForwardBackward) -> Outcome:
        logprob = np.float32(-math.log(self._card.vocab_size))
        logprobs = [np.full(int(n), logprob, dtype=np.float32) for n in payload.tokens.lengths_array()]
        weights = payload.inputs.get("weights")
        total = float(weights.values().sum()) if weights is not None else float(sum(map(len, logprobs)))
        return ForwardBackwardDone(
            outputs={"logprobs": Column.of(list(logprobs), dtype="float32")},
            metrics={"loss:sum": -float(logprob) * total},
            backward=payload.backward,
        )

    def _sample(self, payload: Sample) -> Outcome:
        logprob = np.float32(-math.log(self._card.vocab_size))
        num = payload.params.max_tokens
        length = len(payload.prompt) // 4

        def topk(positions: int, k: int) -> TopK | None:
            ids = np.tile(np.arange(k, dtype="<i4"), positions)
            return (
                TopK(token_ids=ids.tobytes(), logprobs=np.full(ids.shape, logprob).tobytes(), k=k, length=positions)
                if k
                else None
            )

        sequences = []
        for index in range(payload.num_samples):
            rng = np.random.default_rng((payload.params.seed or 0, index))
            tokens = rng.integers(0, self._card.vocab_size, num, dtype=np.int32)
            sequences.append(
                Sequence(
                    stop_reason="length",
                    tokens=tokens.tobytes(),
                    logprobs=np.full(num, logprob, dtype="<f4").tobytes(),
                    topk=topk(num, payload.topk_sample_logprobs),
                )
            )
        prompt = np.full(length, logprob, dtype="<f4")
        prompt[0] = np.nan
        return SampleDone(
            sequences=sequences,
            prompt_logprobs=prompt.tobytes() if payload.prompt_logprobs else None,
            topk_prompt=topk(length, payload.topk_prompt_logprobs),
        )


def _records(job: Job, payload: object, outcome: Outcome, *, output_dir: Path | None) -> Iterator[RecordWrite]:
    tenant = str(job.tenant)
    match outcome:
        case CreateModelDone() | LoadWeightsDone():
            yield RecordWrite(kind=RecordKind.MODEL, record_id=job.owner, fields={"state": "ready"})
        case SaveWeightsDone(path=path) | SaveForSamplerDone(path=str(path)) | SaveExternalDone(path=path):
            files = {} if output_dir is None else _write_files(path, output_dir)
            fields = {**_checkpoint(job, payload), **files}
            yield RecordWrite(kind=RecordKind.CHECKPOINT, record_id=path, fields=fields)
            last = "last_checkpoint" if "/weights/" in path else "last_sampler_checkpoint"
            yield RecordWrite(kind=RecordKind.MODEL, record_id=job.owner, fields={last: path})
        case CopyCheckpointDone(path=path):
            files = {} if output_dir is None else _write_files(path, output_dir)
            yield RecordWrite(kind=RecordKind.CHECKPOINT, record_id=path, fields={**_checkpoint(job, payload), **files})
            fields = {"state": "unloaded", "last_checkpoint": path}
            yield RecordWrite(kind=RecordKind.MODEL, record_id=job.owner, fields=fields)
        case DeleteCheckpointDone(path=path):
            yield RecordWrite(kind=RecordKind.CHECKPOINT, record_id=path, fields=None)
        case SaveForSamplerDone(sampler_id=str(sampler)):
            assert isinstance(payload, SaveForSampler)
            fields = {
                "tenant": tenant,
                "session": str(payload.session_id),
                "created_ms": _now_ms(),
                "base_model": "tests/uniform",
                "model_path": f"tinker://{job.owner}/ephemeral/{sampler}",
            }
            yield RecordWrite(kind=RecordKind.SAMPLER, record_id=sampler, fields=fields)
        case UnloadModelDone():
            yield RecordWrite(kind=RecordKind.MODEL, record_id=job.owner, fields={"state": "unloaded"})
        case _:
            return


def _checkpoint(job: Job, payload: object) -> dict[str, str]:
    assert isinstance(payload, SaveWeights | SaveForSampler | SaveExternal | CopyCheckpoint)
    metadata = None if isinstance(payload, CopyCheckpoint) else payload.user_metadata
    ttl_ms = None if payload.ttl_seconds is None else 1000 * payload.ttl_seconds
    created_ms = _now_ms()
    return {
        "tenant": str(job.tenant),
        "model": job.owner,
        "base_model": "tests/uniform",
        "rank": "8",
        "created_ms": created_ms,
        "expires_ms": "" if ttl_ms is None else str(int(created_ms) + ttl_ms),
        "size_bytes": "1000",
        "user_metadata": json.dumps(metadata or {}),
    }


def _write_files(path: str, output_dir: Path) -> dict[str, str]:
    """Two files that hold the checkpoint's path, and the record's fields that name them."""
    directory = Path("saved") / path.removeprefix("tinker://")
    (output_dir / directory).mkdir(parents=True, exist_ok=True)
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        (output_dir / directory / name).write_text(f"{name} of {path}")
    sizes = {name: (output_dir / directory / name).stat().st_size for name in names}
    return {"directory": str(directory), "files": json.dumps(sizes)}


def _now_ms() -> str:
    return str(time.time_ns() // 1_000_000)


@contextlib.contextmanager
def echo_worker(url: str, *, engine: str, card: EngineCard, output_dir: Path | None = None) -> Iterator[EchoWorker]:
    """A running worker. With output_dir, its checkpoints have files there."""
    worker = EchoWorker(url, engine=engine, card=card, output_dir=output_dir)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
