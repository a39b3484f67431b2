import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from tests.support.save_and_sample import read_outcomes, run_rank, scenario

from gradstream.engine.parallel.comm import Comm
from gradstream.shared.wire import Failed, ForwardBackwardDone, SampleDone

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """The outcomes of one rank alone, then of each rank of two."""
    root = tmp_path_factory.mktemp("ranks")
    alone = scenario(Comm.single(), root / "alone")
    rendezvous = f"file://{root / 'store'}"
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, 2, rendezvous, root / "two", Path(root, f"rank-{rank}")))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
        assert process.exitcode == 0
    return [alone, *(read_outcomes(root / f"rank-{rank}") for rank in range(2))]


def assert_close(left, right):
    """Equal but for the rounding of log-probabilities."""
    assert type(left) is type(right), (left, right)
    if not isinstance(left, SampleDone):
        assert isinstance(left, ForwardBackwardDone) or left == right
        return
    np.testing.assert_allclose(floats(left.prompt_logprobs), floats(right.prompt_logprobs), atol=1e-5)
    for one, other in zip(left.sequences, right.sequences, strict=True):
        assert (one.tokens, one.stop_reason) == (other.tokens, other.stop_reason)
        np.testing.assert_allclose(floats(one.logprobs), floats(other.logprobs), atol=1e-5)


def floats(data):
    return np.frombuffer(data, "<f4")


def test_two_ranks_answer_as_one_does(by_rank):
    alone, leader, _ = by_rank
    assert len(alone) == len(leader) == 14
    for left, right in zip(alone, leader, strict=True):
        assert_close(left, right)
    assert sum(isinstance(outcome, Failed) for outcome in leader) == 3


def test_every_rank_learns_the_same_outcomes_of_saves_loads_and_samples(by_rank):
    _, leader, follower = by_rank
    for left, right in zip(leader, follower, strict=True):
        if not isinstance(left, ForwardBackwardDone):
            assert left == right


def test_a_loaded_model_has_the_same_loss_on_two_ranks(by_rank):
    alone, leader, _ = by_rank
    assert leader[-1].metrics["loss:sum"] == pytest.approx(alone[-1].metrics["loss:sum"], rel=1e-5)
