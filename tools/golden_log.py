"""Records the small run in tests/golden, which the tests replay: a real gang on the tiny model, every job fixed.

    python -m tools.golden_log [FILE]

Run it when the format of the log, of its jobs or the arithmetic changes on purpose; docs/replay.md says what the run holds.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from gradstream.shared import codec, ids
from gradstream.shared.clock import SystemClock
from gradstream.shared.columns import Column
from gradstream.shared.config import Settings, resolve, write_handover
from gradstream.shared.config.machine import Machine
from gradstream.shared.embedded.config import EmbeddedConfig
from gradstream.shared.embedded.server import EmbeddedServer
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.joblog.limits import limits_of
from gradstream.shared.joblog.port import Submission
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import (
    AdamParams,
    CreateModel,
    ForwardBackward,
    LoadWeights,
    LoraSpec,
    OptimStep,
    Payload,
    SaveWeights,
)
from gradstream.worker.directories import joblog_dir
from gradstream.worker.disklog.archive import export_log
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.selection import Choice

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

MODEL = Path("tests/models/tiny-qwen3-shakespeare")
FILE = Path("tests/golden/run.gslog")
BASE_MODEL = "gradstream/tiny-qwen3-shakespeare"
ENGINE = "golden"
TIMEOUT_S = 180.0
SESSION = ids.SessionId("golden")
FIRST, SECOND = ids.model_id(SESSION, 1), ids.model_id(SESSION, 2)


def jobs() -> list[tuple[ModelId, Payload]]:
    """The run, in the order in which it is submitted: two adapters that share batches, two losses, a save, a load, a failure."""
    saved = f"tinker://{FIRST}/weights/middle"
    return [
        (FIRST, _create(rank=4)),
        (SECOND, _create(rank=2)),
        (FIRST, _cross_entropy(9, 5, seed=1)),
        (SECOND, _importance_sampling(7, seed=2)),
        (FIRST, _step(1e-2)),
        (SECOND, _step(2e-2)),
        (FIRST, SaveWeights(name="middle")),
        (FIRST, _cross_entropy(12, seed=3)),
        (SECOND, _cross_entropy(6, 4, seed=4)),
        # No such loss: it fails, and changes nothing.
        (SECOND, msgspec.structs.replace(_cross_entropy(3, seed=5), loss_fn="hinge")),
        (FIRST, _step(1e-2)),
        (SECOND, _step(2e-2)),
        (FIRST, LoadWeights(path=saved, with_optimizer=True)),
        (FIRST, _importance_sampling(8, seed=6)),
        (FIRST, _step(5e-3)),
        (SECOND, _cross_entropy(5, seed=7)),
        (SECOND, _step(1e-2)),
    ]


def main() -> None:
    """Record the run into the file that is named, or into the repository's."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        asyncio.run(_record(directory))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        log = DiskLog(joblog_dir(directory / "out", ENGINE))
        end = export_log(log, file, Choice(), clock=SystemClock())
    # Only what the repository shows anyway is in it.
    file.chmod(0o644)
    sys.stdout.write(f"{file}: {end.num_jobs} jobs, {end.num_batches} batches, {file.stat().st_size} bytes\n")


async def _record(directory: Path) -> None:
    """Submit everything, then start a gang, so that which jobs share a batch does not depend on time."""
    with EmbeddedServer(EmbeddedConfig(data_dir=directory / "redis")) as server:
        settings = _settings(directory, redis_url=server.url)
        async with RedisIntake(server.url, engine=ENGINE, limits=limits_of(settings)) as intake:
            futures = [await _submit(intake, number) for number in range(len(jobs()))]
            path = directory / "settings.json"
            write_handover(msgspec.structs.replace(settings, lease_owner="golden"), path)
            command = [sys.executable, "-m", "gradstream.worker", "--settings", str(path)]
            gang = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                for future in futures:
                    await _await_outcome(intake, future, gang)
            finally:
                gang.terminate()
                await gang.wait()


def _settings(directory: Path, *, redis_url: str) -> Settings:
    given = {
        "model_path": str(MODEL),
        "model_name": BASE_MODEL,
        "enable_lora": True,
        "device": "cpu",
        "torch_threads": 1,
        "output_dir": str(directory / "out"),
        "redis_url": redis_url,
        "engine_name": ENGINE,
    }
    return resolve(msgspec.convert({**given, "explicit": sorted(given)}, Settings), Machine.here()).settings


async def _submit(intake: RedisIntake, number: int) -> FutureId:
    listed = jobs()
    model, payload = listed[number]
    seq = sum(owner == model for owner, _ in listed[:number])
    record = {"session": SESSION, "tenant": ids.LOCAL_TENANT, "base_model": BASE_MODEL} if seq == 0 else None
    receipt = await intake.submit(
        Submission(
            owner=model,
            seq=seq,
            op=codec.op_of(payload),
            tenant=ids.LOCAL_TENANT,
            payload=codec.encode(payload),
            num_tokens=len(payload.tokens.data) // 4 if isinstance(payload, ForwardBackward) else 0,
            model_record=record,
        )
    )
    return receipt.future_id


async def _await_outcome(intake: RedisIntake, future: FutureId, gang: asyncio.subprocess.Process) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while (view := await intake.wait(future, timeout_s=2)) is None or view.outcome is None:
        if gang.returncode is not None or time.monotonic() > deadline_s:
            raise SystemExit(f"the gang ended or hung before {future} was done")


def _create(*, rank: int) -> CreateModel:
    return CreateModel(session_id=SESSION, base_model=BASE_MODEL, lora=LoraSpec(rank=rank, seed=rank))


def _step(learning_rate: float) -> OptimStep:
    return OptimStep(adam=AdamParams(learning_rate=learning_rate))


def _cross_entropy(*lengths: int, seed: int) -> ForwardBackward:
    tokens = _tokens(lengths, seed=seed)
    return ForwardBackward(
        tokens=Column.of([one[:-1] for one in tokens], dtype="int32"),
        inputs={"target_tokens": Column.of([one[1:] for one in tokens], dtype="int64")},
        loss_fn="cross_entropy",
    )


def _importance_sampling(*lengths: int, seed: int) -> ForwardBackward:
    tokens = _tokens(lengths, seed=seed)
    generator = np.random.default_rng(100 + seed)
    logprobs: list[Array] = [-9 - 2 * generator.random(len(one) - 1) for one in tokens]
    advantages: list[Array] = [generator.standard_normal(len(one) - 1) for one in tokens]
    return ForwardBackward(
        tokens=Column.of([one[:-1] for one in tokens], dtype="int32"),
        inputs={
            "target_tokens": Column.of([one[1:] for one in tokens], dtype="int64"),
            "logprobs": Column.of(logprobs, dtype="float32"),
            "advantages": Column.of(advantages, dtype="float32"),
        },
        loss_fn="importance_sampling",
    )


def _tokens(lengths: tuple[int, ...], *, seed: int) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 2000, size=length + 1) for length in lengths]


if __name__ == "__main__":
    main()
