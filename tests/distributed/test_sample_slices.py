"""Samples that join and leave slices on two ranks answer as on one, and each rank knows which of them run."""

import numpy as np
import pytest
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data
from tests.support.ranks import Ranks

from gradstream.engine.parallel.comm import Comm
from gradstream.shared import codec
from gradstream.shared.ids import LOCAL_TENANT
from gradstream.shared.wire import Batch, Failed, Plan, Sample, SampleDone, SamplingParams

pytestmark = pytest.mark.gloo

MODEL = "s:train:0"


def _sample(seed: int) -> Sample:
    prompt = np.arange(40, 43 + 4 * seed, dtype="<i4").tobytes()
    # The fourth is refused.
    max_tokens = 0 if seed == 3 else 4 + 7 * (seed % 3)
    params = SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=[])
    return Sample(path=None, prompt=prompt, params=params, num_samples=1 + seed % 2)


def _serve(comm: Comm) -> tuple[dict[str, bytes], list[int]]:
    """Outcomes by future id of six samples, one admitted a slice, with training between; and how many ran after each slice."""
    driver = Driver(open_engine(comm=comm))
    driver.create(MODEL)
    outcomes: dict[str, bytes] = {}
    num_running = []
    for turn in range(14):
        jobs = [driver._job("s:sample:0", _sample(turn), LOCAL_TENANT)] if turn < 6 else []
        ids = [job.future_id for job in jobs]
        plan = Plan(kind="sample", future_ids=ids, row_budget_tokens=64, num_steps=3)
        ended = driver.engine.execute(Batch(number=turn + 1, epoch=1, plan=plan, jobs=jobs))
        assert not ended.keys() & outcomes.keys()
        outcomes |= {future_id: codec.encode(outcome) for future_id, outcome in ended.items()}
        num_running.append(len(driver.engine.state.decoding))
        if turn % 3 == 0:
            driver.done(MODEL, cross_entropy(random_data([9, 5], seed=turn)))
            driver.step(MODEL, learning_rate=1e-2)
    return outcomes, num_running


def _read(outcomes: dict[str, bytes]):
    return {future_id: codec.decode_outcome(data) for future_id, data in outcomes.items()}


def test_two_ranks_answer_slices_as_one_does(two_ranks: Ranks) -> None:
    alone, _ = _serve(Comm.single())
    (leader, running), (follower, also_running) = two_ranks.run(_serve)
    assert leader == follower
    assert running == also_running
    assert running[-1] == 0
    assert max(running) > 1
    one, two = _read(alone), _read(leader)
    assert one.keys() == two.keys()
    assert len(one) == 6
    assert sum(isinstance(outcome, Failed) for outcome in two.values()) == 1
    for future_id, left in one.items():
        right = two[future_id]
        if not isinstance(left, SampleDone):
            assert left == right
            continue
        assert isinstance(right, SampleDone)
        assert [seq.tokens for seq in left.sequences] == [seq.tokens for seq in right.sequences]
        for mine, other in zip(left.sequences, right.sequences, strict=True):
            np.testing.assert_allclose(
                np.frombuffer(mine.logprobs, "<f4"), np.frombuffer(other.logprobs, "<f4"), atol=1e-5
            )
