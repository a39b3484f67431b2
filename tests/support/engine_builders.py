"""Builders for engines, jobs and batches of tiny models."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from gradstream.engine.config import EngineConfig
from gradstream.engine.engine import Engine
from gradstream.engine.packing import Packing
from gradstream.engine.parallel.comm import Comm
from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.ids import LOCAL_TENANT, ModelId, SessionId, TenantId, future_id
from gradstream.shared.wire import (
    AdamParams,
    Batch,
    CreateModel,
    Failed,
    ForwardBackward,
    ForwardBackwardDone,
    Job,
    LoraSpec,
    OptimStep,
    Outcome,
    Payload,
    Plan,
)

MODELS = Path(__file__).parent.parent / "models"
DENSE = MODELS / "tiny-qwen3-shakespeare"
MOE = MODELS / "tiny-qwen3-moe-shakespeare"
LORA_ALPHA = 16.0
VOCAB = 2048


def engine_config(path: Path = DENSE, **changes: object) -> EngineConfig:
    settings = {
        "model_path": path,
        "model_name": "tiny",
        "tokenizer_id": "tiny",
        "output_dir": path,
        "lora_alpha": LORA_ALPHA,
        "max_lora_rank": 64,
        "torch_threads": 1,
        **changes,
    }
    return EngineConfig(**settings)  # type: ignore[arg-type]


def open_engine(path: Path = DENSE, comm: Comm | None = None, **changes: object) -> Engine:
    return Engine.open(engine_config(path, **changes), comm or Comm.single())


class Driver:
    """Feeds payloads to an engine as one client after another would, keeping each model's seq."""

    def __init__(self, engine: Engine, *, row_budget_tokens: int = 8192) -> None:
        self.engine = engine
        self.row_budget_tokens = row_budget_tokens
        self.isolate_jobs = False
        self.packing: Packing = "sequential"
        self.shared_prompt_tokens = 0
        self._number = 0
        self._seqs: dict[str, int] = {}

    def run(self, *work: tuple[str, Payload], tenant: TenantId = LOCAL_TENANT) -> list[Outcome]:
        """The outcomes of one batch of (model, payload)."""
        jobs = [self._job(model, payload, tenant) for model, payload in work]
        self._number += 1
        plan = Plan(
            kind=jobs[0].op,
            future_ids=[job.future_id for job in jobs],
            row_budget_tokens=self.row_budget_tokens,
            isolate_jobs=self.isolate_jobs,
            packing=self.packing,
            shared_prompt_tokens=self.shared_prompt_tokens,
        )
        outcomes = self.engine.execute(Batch(number=self._number, epoch=1, plan=plan, jobs=jobs))
        return [outcomes[job.future_id] for job in jobs]

    def done(self, model: str, payload: Payload) -> Outcome:
        """The outcome of one job, which must not fail."""
        (outcome,) = self.run((model, payload))
        assert not isinstance(outcome, Failed), outcome
        return outcome

    def create(self, model: str, *, rank: int = 8, seed: int | None = 1, **switches: bool) -> None:
        self.done(model, create(rank=rank, seed=seed, **switches))

    def step(self, model: str, **adam: float) -> Outcome:
        return self.done(model, OptimStep(adam=AdamParams(**adam)))

    def grad(self, model: str) -> torch.Tensor:
        return self.engine.state.models[ModelId(model)].grad.clone()

    def weights(self, model: str) -> torch.Tensor:
        return self.engine.state.models[ModelId(model)].weights.clone()

    def _job(self, model: str, payload: Payload, tenant: TenantId) -> Job:
        seq = self._seqs.get(model, 0)
        self._seqs[model] = seq + 1
        owner = ModelId(model)
        return Job(
            future_id=future_id(owner, seq),
            owner=owner,
            seq=seq,
            op=codec.op_of(payload),
            tenant=tenant,
            payload=codec.encode(payload),
        )


def create(*, rank: int = 8, seed: int | None = 1, base_model: str = "tiny", **switches: bool) -> CreateModel:
    return CreateModel(
        session_id=SessionId("s"), base_model=base_model, lora=LoraSpec(rank=rank, seed=seed, **switches)
    )


class Data(msgspec.Struct):
    """Datums as lists of arrays."""

    tokens: list[np.ndarray]
    targets: list[np.ndarray]
    weights: list[np.ndarray]

    def __getitem__(self, part: slice) -> "Data":
        return Data(self.tokens[part], self.targets[part], self.weights[part])


def random_data(lengths: Sequence[int], *, seed: int = 0, vocab: int = VOCAB) -> Data:
    """Random datums; weights are real numbers of both signs with some zeros."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, vocab, length).astype(np.int32) for length in lengths]
    targets = [rng.integers(0, vocab, length) for length in lengths]
    weights = [(rng.normal(size=length) * (rng.random(length) > 0.25)).astype(np.float32) for length in lengths]
    return Data(tokens, targets, weights)


def cross_entropy(data: Data, *, backward: bool = True) -> ForwardBackward:
    return ForwardBackward(
        tokens=Column.of(list(data.tokens), dtype="int32"),
        inputs={
            "target_tokens": Column.of(list(data.targets), dtype="int64"),
            "weights": Column.of(list(data.weights), dtype="float32"),
        },
        loss_fn="cross_entropy",
        backward=backward,
    )


def logprobs_of(outcome: Outcome) -> list[np.ndarray]:
    assert isinstance(outcome, ForwardBackwardDone), outcome
    return outcome.outputs["logprobs"].arrays()


def loss_of(outcome: Outcome) -> float:
    assert isinstance(outcome, ForwardBackwardDone), outcome
    return outcome.metrics["loss:sum"]


def randomize(driver: Driver, model: str, *, seed: int = 7, std: float = 0.05) -> None:
    """Give b random values too, so that every gradient is non-zero."""
    weights = driver.engine.state.models[ModelId(model)].weights
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
    weights.add_(noise, alpha=std)
