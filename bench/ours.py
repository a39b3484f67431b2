"""The engine of the server in this process, without the server: the same batches as the gang would execute."""

import time
from pathlib import Path

from bench.text import Text, Tokens
from gradstream.engine.config import EngineConfig
from gradstream.engine.engine import Engine
from gradstream.engine.parallel.comm import Comm
from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, SessionId, future_id
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

_NAME = "bench"


def cross_entropy(sequences: list[Tokens]) -> ForwardBackward:
    """A job: each token of a sequence is to foretell the next one."""
    return ForwardBackward(
        tokens=Column.of([tokens[:-1].astype("int32") for tokens in sequences], dtype="int32"),
        inputs={"target_tokens": Column.of([tokens[1:] for tokens in sequences], dtype="int64")},
        loss_fn="cross_entropy",
        backward=True,
    )


class EngineJobs:
    """An engine with some adapters, and batches of jobs on them. Models are numbered from 0."""

    def __init__(self, folder: Path, *, rank: int, num_models: int = 1, row_budget_tokens: int = 8192) -> None:
        config = EngineConfig(model_path=folder, model_name=_NAME, tokenizer_id=_NAME, output_dir=folder)
        self.engine = Engine.open(config, Comm.single())
        self._row_budget_tokens = row_budget_tokens
        self._seqs = [0] * num_models
        self._number = 0
        for model in range(num_models):
            lora = LoraSpec(rank=rank, seed=0, train_unembed=False)
            self.run({model: CreateModel(session_id=SessionId("s"), base_model=_NAME, lora=lora)})

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
        owner, seq = ModelId(f"s:train:{model}"), self._seqs[model]
        self._seqs[model] += 1
        return Job(
            future_id=future_id(owner, seq),
            owner=owner,
            seq=seq,
            op=codec.op_of(payload),
            tenant=LOCAL_TENANT,
            payload=codec.encode(payload),
        )
