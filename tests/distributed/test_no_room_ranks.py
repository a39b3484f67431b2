"""One rank without room fails a job on all of them, which then go on as if it had not been sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data, randomize
from tests.support.ranks import Ranks
from torch import Tensor

from gradstream.engine.optim import _elements
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.residency import table
from gradstream.engine.residency.parked import ParkedModel
from gradstream.shared.ids import LOCAL_TENANT
from gradstream.shared.wire import (
    AdamParams,
    Batch,
    Failed,
    OptimStep,
    Outcome,
    Plan,
    Sample,
    SampleDone,
    SamplingParams,
)

pytestmark = pytest.mark.gloo

STEP = OptimStep(adam=AdamParams(learning_rate=1e-2))


def lack(*_: object, **__: object) -> Tensor:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 1.00 GiB"
    )


@contextmanager
def lacking(comm: Comm, rank: int, module: object, name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == rank:
            patch.setattr(module, name, lack)
        yield


def _failing(comm: Comm, directory: Path, rank: int, *, is_harmed: bool) -> tuple[list[Outcome], dict[str, Tensor]]:
    """A pass, an update and a model that comes to the device, each of which finds no room on one rank first; and the state at the end."""
    engine = open_engine(comm=comm, output_dir=directory, max_active_adapters=2)
    driver = Driver(engine, row_budget_tokens=16)
    for name in "abc":
        driver.create(name, rank=4)
    randomize(driver, "b")
    failures: list[Outcome] = []
    work = ("b", cross_entropy(random_data([9, 12, 5, 7])))
    if is_harmed:
        layer = engine.state.base.causal_lm.get_submodule("model.layers.0.mlp")
        hook = layer.register_forward_hook(lack) if comm.rank == rank else None
        failures += driver.run(work)
        if hook is not None:
            hook.remove()
    driver.run(work)
    if is_harmed:
        with lacking(comm, rank, _elements, "stored"):
            failures += driver.run(("b", STEP))
    driver.run(("b", STEP))
    if is_harmed:
        with lacking(comm, rank, table, "to_adapter"):
            failures += driver.run(("a", STEP))
    driver.run(("a", STEP))
    states = {
        f"{state.model_id} {name}": tensor for state in engine.capture("abc") for name, tensor in state.tensors.items()
    }
    return failures, states


@pytest.mark.parametrize("rank", [0, 1])
def test_no_room_on_one_rank_fails_the_job_on_all_and_changes_nothing(
    tmp_path: Path, rank: int, two_ranks: Ranks
) -> None:
    whole = two_ranks.run(_unharmed, tmp_path / "whole")
    for (failures, states), (_, wanted) in zip(two_ranks.run(_harmed, tmp_path, rank), whole, strict=True):
        assert [failure.code for failure in failures if isinstance(failure, Failed)] == ["out_of_memory"] * 3
        assert states.keys() == wanted.keys()
        assert all(torch.equal(states[name], tensor) for name, tensor in wanted.items())


def _harmed(comm: Comm, directory: Path, rank: int) -> tuple[list[Outcome], dict[str, Tensor]]:
    return _failing(comm, directory, rank, is_harmed=True)


def _unharmed(comm: Comm, directory: Path) -> tuple[list[Outcome], dict[str, Tensor]]:
    return _failing(comm, directory, 0, is_harmed=False)


# Tokens of prompts in one pass for which the harmed rank has room.
ROOM = 20


def _sampling(comm: Comm, directory: Path, rank: int) -> tuple[dict[str, Outcome], list[bool], int]:
    """What samples gave, of which one rank has no room for the longest; which models rest at the end; and how many samples run."""
    driver = Driver(open_engine(comm=comm, output_dir=directory))
    for name in "ab":
        driver.create(name, rank=4)
    base = driver.engine.state.base
    hidden = base.hidden

    def crowded(tokens_T: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return lack() if len(tokens_T) > ROOM else hidden(tokens_T, *arguments, **named)

    if comm.rank == rank:
        base.hidden = crowded  # type: ignore[method-assign]
    samples = [
        Sample(path=None, prompt=np.arange(4, 4 + length, dtype="<i4").tobytes(), params=_params(length))
        for length in (6, 30, 9, 31, 15, 7, 8)
    ]
    jobs = [driver._job("s:sample:0", payload, LOCAL_TENANT) for payload in samples]
    plan = Plan(kind="sample", future_ids=[job.future_id for job in jobs], row_budget_tokens=64)
    outcomes: dict[str, Outcome] = dict(driver.engine.execute(Batch(number=1, epoch=1, plan=plan, jobs=jobs)))
    models = driver.engine.state.models
    return outcomes, [isinstance(models.peek(name), ParkedModel) for name in models], len(driver.engine.state.decoding)


def _params(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=7, seed=seed, stop_token_ids=[])


def _tokens(outcome: Outcome) -> list[bytes]:
    assert isinstance(outcome, SampleDone)
    return [one.tokens for one in outcome.sequences]


@pytest.mark.parametrize("rank", [0, 1])
def test_samples_without_room_on_one_rank_fail_alone_and_every_rank_knows(
    tmp_path: Path, rank: int, two_ranks: Ranks
) -> None:
    ((wanted, is_parked, _), _) = two_ranks.run(_sampling, tmp_path / "whole", -1)
    leader, follower = two_ranks.run(_sampling, tmp_path / "harmed", rank)
    assert leader == follower
    outcomes, is_parked_harmed, num_running = leader
    assert (is_parked, is_parked_harmed, num_running) == ([False, False], [True, True], 0)
    failed = {future_id: one.code for future_id, one in outcomes.items() if isinstance(one, Failed)}
    assert list(failed.values()) == ["out_of_memory"]
    assert all(_tokens(outcomes[one]) == _tokens(wanted[one]) for one in wanted if one not in failed)
