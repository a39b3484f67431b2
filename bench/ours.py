"""The engine of the server in this process, without the server: the same batches as the gang would execute.

Imports nothing but torch, transformers, numpy and the engine, so that `bench.gpu` runs where the server's packages are not installed.
"""

import time
from pathlib import Path

from bench.text import Text, Tokens
from gradstream.engine.config import EngineConfig, Numerics
from gradstream.engine.engine import Engine
from gradstream.engine.parallel.comm import Comm
from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.ids import DEFAULT_MODEL, LOCAL_TENANT, FutureId, ModelId, SessionId, future_id
from gradstream.shared.wire import (
    AdamParams,
    Batch,
    CreateModel,
    Failed,
    ForwardBackward,
    Job,
    LoraSpec,
    OptimStep,
    Outcome,
    Payload,
    Plan,
)

NAME = "bench"


def cross_entropy(sequences: list[Tokens]) -> ForwardBackward:
    """A job: each token of a sequence is to foretell the next one."""
    return ForwardBackward(
        tokens=Column.of([tokens[:-1].astype("int32") for tokens in sequences], dtype="int32"),
        inputs={"target_tokens": Column.of([tokens[1:] for tokens in sequences], dtype="int64")},
        loss_fn="cross_entropy",
        backward=True,
    )


class EngineJobs:
    """An engine, and batches of jobs on its models, which are numbered from 0 in the order of their making."""

    def __init__(self, engine: Engine, *, row_budget_tokens: int) -> None:
        self.engine = engine
        self._row_budget_tokens = row_budget_tokens
        self._owners: list[ModelId] = []
        self._seqs: list[int] = []
        self._number = 0

    @classmethod
    def of_loras(cls, folder: Path, *, rank: int, num_models: int = 1, row_budget_tokens: int = 8192) -> "EngineJobs":
        """With some adapters on the model in a folder."""
        jobs = cls.of_config(folder, row_budget_tokens=row_budget_tokens)
        for _ in range(num_models):
            jobs.create(LoraSpec(rank=rank, seed=0, train_unembed=False))
        return jobs

    @classmethod
    def of_config(
        cls, folder: Path, *, is_lora: bool = True, numerics: Numerics | None = None, row_budget_tokens: int = 8192
    ) -> "EngineJobs":
        """Without models yet, on the base model in a folder. numerics None: the defaults."""
        config = EngineConfig(
            model_path=folder,
            model_name=NAME,
            tokenizer_id=NAME,
            output_dir=folder,
            is_lora=is_lora,
            numerics=numerics or Numerics(),
        )
        return cls(Engine.open(config, Comm.single()), row_budget_tokens=row_budget_tokens)

    def create(self, lora: LoraSpec | None) -> None:
        """Another adapter; None: the model itself, for training in full."""
        model = len(self._owners)
        self._owners.append(ModelId(DEFAULT_MODEL if lora is None else f"s:train:{model}"))
        self._seqs.append(0)
        self.run({model: CreateModel(session_id=SessionId("s"), base_model=NAME, lora=lora)})

    def run(self, work: dict[int, Payload], *, shared_prompt_tokens: int = 0) -> dict[FutureId, Outcome]:
        """One batch of a payload for each of some models; raises RuntimeError when a job fails. shared_prompt_tokens: as in Plan."""
        self._number += 1
        jobs = [self._job(model, payload) for model, payload in work.items()]
        plan = Plan(
            kind=jobs[0].op,
            future_ids=[job.future_id for job in jobs],
            row_budget_tokens=self._row_budget_tokens,
            shared_prompt_tokens=shared_prompt_tokens,
        )
        outcomes = self.engine.execute(Batch(number=self._number, epoch=1, plan=plan, jobs=jobs))
        failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
        if failures:
            raise RuntimeError(failures[0].message)
        return outcomes

    def train(self, text: Text, adam: AdamParams) -> float:
        """CPU time in s, which other programs do not lengthen, of a forward_backward and an optim_step for each of the text's steps."""
        payloads = [cross_entropy(list(step)) for step in text.steps]
        started = time.process_time()
        for payload in payloads:
            self.run({0: payload})
            self.run({0: OptimStep(adam=adam)})
        return time.process_time() - started

    def _job(self, model: int, payload: Payload) -> Job:
        owner, seq = self._owners[model], self._seqs[model]
        self._seqs[model] += 1
        return Job(
            future_id=future_id(owner, seq),
            owner=owner,
            seq=seq,
            op=codec.op_of(payload),
            tenant=LOCAL_TENANT,
            payload=codec.encode(payload),
        )
