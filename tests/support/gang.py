"""A real gang on a real job log: the processes, and a client that submits jobs and awaits their outcomes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from examples.local_server import free_port
from gradstream.shared import codec, ids
from gradstream.shared.columns import Column
from gradstream.shared.config import Settings, load_settings, read_handover, resolve, write_handover
from gradstream.shared.config.machine import Machine
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.joblog.port import Submission
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import (
    AdamParams,
    CreateModel,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    Outcome,
    Payload,
    Sample,
    SamplingParams,
)
from gradstream.worker.engine_watch import EngineWatch, Sight

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen3-shakespeare"
BASE_MODEL = "tiny"
READY_S = 240
# A gang that ended may have to be replaced before.
OUTCOME_S = READY_S + 120


def settings_file(directory: Path, *, redis_url: str, engine: str, owner: str = "launcher-1", **fields: object) -> Path:
    """A launcher's settings file for the tiny model; its output directory is directory/out."""
    given: Mapping[str, object] = {
        "model_path": TINY,
        "model_name": BASE_MODEL,
        "enable_lora": True,
        "output_dir": directory / "out",
        "redis_url": redis_url,
        "engine_name": engine,
        "torch_threads": 1,
        **fields,
    }
    config = directory / "config.yaml"
    config.write_text("".join(f"{name}: {_yaml(value)}\n" for name, value in given.items()), encoding="utf-8")
    settings = resolve(load_settings(config), Machine.here()).settings
    path = directory / "settings.json"
    write_handover(msgspec.structs.replace(settings, lease_owner=owner), path)
    return path


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def gang(
    settings: Path, *, num_ranks: int = 1, log: Path | None = None, leads: bool = True
) -> Iterator[subprocess.Popen[bytes]]:
    """A running gang, its processes gone afterwards, and with the test process. One rank runs without torchrun.

    It leads when the block begins; one that ends before that fails the test at once. leads False: it need not get there.
    """
    module = ["-m", "gradstream.worker", "--settings", str(settings)]
    if num_ranks > 1:
        where = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        module = ["-m", "gradstream.worker.torchrun", "--nproc-per-node", str(num_ranks), *where, *module]
    log = log or settings.with_suffix(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    read: Settings = read_handover(settings)
    with log.open("ab") as sink, EngineWatch(str(read.redis_url), engine=read.engine_name) as watch:
        before = watch.look() or Sight()
        process = subprocess.Popen(
            [sys.executable, *module], stdout=sink, stderr=sink, start_new_session=True, env=environment
        )
        try:
            if leads:
                _await_lead(process, watch, after_epoch=before.epoch, log=log)
            yield process
        finally:
            _end(process)


def _await_lead(process: subprocess.Popen[bytes], watch: EngineWatch, *, after_epoch: int, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        sight = watch.look() or Sight()
        if sight.epoch > after_epoch and sight.card_epoch == sight.epoch:
            return
        assert process.poll() is None, f"the gang ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"the gang did not lead within {READY_S} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Client:
    """Submits jobs of one session and awaits their outcomes."""

    def __init__(self, intake: RedisIntake, *, session: str = "s1") -> None:
        self.intake = intake
        self.session = ids.SessionId(session)
        self._next_seq: dict[str, int] = {}

    async def ready(self, *, epoch: int = 1) -> None:
        """Return when a gang of at least this epoch serves."""
        async with asyncio.timeout(READY_S):
            while (card := await self.intake.card()) is None or card.epoch < epoch:  # noqa: ASYNC110 - a poll with a deadline
                await asyncio.sleep(0.1)

    async def create(self, number: int = 1, *, payload: Payload | None = None) -> tuple[ModelId, FutureId]:
        """A model's id and the future of the job that makes it."""
        model = ids.model_id(self.session, number)
        if payload is None:
            lora = LoraSpec(rank=4, seed=number)
            payload = CreateModel(session_id=self.session, base_model=BASE_MODEL, lora=lora)
        self._next_seq[model] = 1
        record = {"session": self.session, "tenant": ids.LOCAL_TENANT, "base_model": BASE_MODEL, "rank": "4"}
        return model, await self._submit(model, 0, payload, record=record)

    def resume(self, model: ModelId, *, seq: int) -> None:
        """Go on with a model that another client made; seq: of its next job."""
        self._next_seq[model] = seq

    async def create_full(self, payload: CreateModel) -> FutureId:
        """The future of the job that makes the one model of a server that trains full weights."""
        self._next_seq[ids.DEFAULT_MODEL] = 1
        record = {"session": self.session, "tenant": ids.LOCAL_TENANT, "base_model": BASE_MODEL}
        return await self._submit(ids.DEFAULT_MODEL, 0, payload, record=record)

    async def submit(self, model: ModelId, payload: Payload) -> FutureId:
        """The future of the model's next job."""
        seq = self._next_seq[model]
        self._next_seq[model] = seq + 1
        return await self._submit(model, seq, payload)

    async def submit_at(self, model: ModelId, seq: int, payload: Payload) -> FutureId:
        """The future of the model's job of this seq."""
        return await self._submit(model, seq, payload)

    async def beside(self, model: ModelId, payload: Payload) -> FutureId:
        """The future of a job of the model that has no place in its order."""
        return await self._submit(model, 2**31, payload, ordered=False)

    async def sample(self, path: str | None, seq: int, *, max_tokens: int = 4) -> FutureId:
        """The future of a greedy sample."""
        prompt = np.array([5, 6, 7], dtype="<i4").tobytes()
        payload = Sample(
            path=path, prompt=prompt, params=SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1)
        )
        return await self.sample_as(payload, seq)

    async def sample_as(self, payload: Sample, seq: int) -> FutureId:
        """The future of this sample."""
        return await self._submit(ids.sampler_id(self.session, 9), seq, payload, ordered=False)

    async def outcome(self, future: FutureId) -> Outcome:
        """The job's outcome; fails the test when there is none in time."""
        async with asyncio.timeout(OUTCOME_S):
            while True:
                view = await self.intake.wait(future, timeout_s=5)
                assert view is not None, f"future {future} does not exist"
                if view.outcome is not None:
                    return codec.decode_outcome(view.outcome)

    async def outcomes(self, futures: list[FutureId]) -> list[Outcome]:
        return [await self.outcome(future) for future in futures]

    async def _submit(
        self, owner: str, seq: int, payload: Payload, *, ordered: bool = True, record: dict[str, str] | None = None
    ) -> FutureId:
        num_tokens = len(payload.tokens.data) // 4 if isinstance(payload, ForwardBackward) else 0
        receipt = await self.intake.submit(
            Submission(
                owner=ModelId(owner),
                seq=seq,
                op=codec.op_of(payload),
                tenant=ids.LOCAL_TENANT,
                payload=codec.encode(payload),
                num_tokens=num_tokens,
                ordered=ordered,
                model_record=record,
            )
        )
        return receipt.future_id


def forward_backward(*lengths: int, seed: int = 0) -> ForwardBackward:
    """Next-token loss on random tokens, one datum per length."""
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(3, 200, size=length + 1) for length in lengths]
    return ForwardBackward(
        tokens=Column.of([one[:-1] for one in tokens], dtype="int32"),
        inputs={"target_tokens": Column.of([one[1:] for one in tokens], dtype="int64")},
        loss_fn="cross_entropy",
    )


def optim_step(*, learning_rate: float = 1e-3) -> OptimStep:
    return OptimStep(adam=AdamParams(learning_rate=learning_rate))


def output_dir(settings: Path) -> Path:
    """Where the gang of these settings saves."""
    read: Settings = read_handover(settings)
    return Path(read.output_dir)
