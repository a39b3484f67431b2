"""Samples that are continued in slices answer as they would alone, whatever happens between the slices."""

from dataclasses import replace

import numpy as np
import pytest
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data, randomize

from gradstream.shared.ids import SamplerId
from gradstream.shared.wire import Batch, Failed, Plan, Sample, SampleDone, SamplingParams, SaveForSampler, UnloadModel

MODEL = "s:train:0"
SAMPLER = "s:sample:0"
EPHEMERAL = "tinker://samplers/s:sample:0"


@pytest.fixture
def driver(tmp_path):
    return Driver(open_engine(output_dir=tmp_path))


def sample(path=None, *, max_tokens=8, seed=3, num_samples=1, first=40):
    prompt = np.arange(first, first + 9, dtype="<i4").tobytes()
    params = SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=[])
    return Sample(path=path, prompt=prompt, params=params, num_samples=num_samples)


class Slices:
    """Runs slices on an engine."""

    def __init__(self, driver):
        self._driver = driver

    def __call__(self, num_steps, *payloads):
        """The future ids of new jobs, and what ended in the slice."""
        jobs = [replace_id(self._driver, payload) for payload in payloads]
        ids = [job.future_id for job in jobs]
        plan = Plan(kind="sample", future_ids=ids, row_budget_tokens=64, num_steps=num_steps)
        return ids, self._driver.engine.execute(Batch(number=1, epoch=1, plan=plan, jobs=jobs))


def replace_id(driver, payload):
    return driver._job(SAMPLER, payload, "local")


def alone(driver, payload):
    return driver.done("alone:sample:0", payload)


def tokens(outcome):
    assert isinstance(outcome, SampleDone), outcome
    return [one.tokens for one in outcome.sequences]


def test_a_slice_continues_by_its_steps_and_a_short_sample_that_joins_late_ends_first(driver):
    run = Slices(driver)
    (long,), ended = run(4, sample(max_tokens=30))
    assert ended == {}
    (short,), ended = run(4, sample(max_tokens=3, seed=8, num_samples=2))
    assert ended.keys() == {short}
    answers = dict(ended)
    num_slices = 0
    while long not in answers:
        answers |= run(4)[1]
        num_slices += 1
    # Thirty tokens, four a slice, two slices of them before.
    assert num_slices == 6
    assert len(driver.engine.state.decoding) == 0
    assert tokens(answers[long]) == tokens(alone(driver, sample(max_tokens=30)))
    assert tokens(answers[short]) == tokens(alone(driver, sample(max_tokens=3, seed=8, num_samples=2)))


def test_training_unloading_and_dropping_the_snapshot_between_slices_change_nothing(driver):
    driver.create(MODEL)
    randomize(driver, MODEL)
    driver.done(MODEL, SaveForSampler(sampler_id=SamplerId(SAMPLER)))
    expected = alone(driver, sample(EPHEMERAL, max_tokens=20))
    run = Slices(driver)
    (future,), _ = run(5, sample(EPHEMERAL, max_tokens=20))
    driver.done(MODEL, cross_entropy(random_data([30, 30])))
    driver.step(MODEL, learning_rate=0.1)
    run(5)
    driver.done(MODEL, UnloadModel())
    driver.engine.state.samplers.drop(EPHEMERAL)
    _, ended = run(0)
    assert ended[future] == expected


def test_slices_between_leave_training_as_it_would_be_without_them(tmp_path):
    weights = []
    for with_slices in (False, True):
        driver = Driver(open_engine(output_dir=tmp_path / str(with_slices)))
        driver.create(MODEL)
        run = Slices(driver)
        for step in range(3):
            if with_slices:
                run(2, sample(max_tokens=9, seed=step))
            driver.done(MODEL, cross_entropy(random_data([12, 7], seed=step)))
            driver.step(MODEL, learning_rate=0.01)
        weights.append(driver.weights(MODEL))
    assert (weights[0] == weights[1]).all()


def test_a_sample_that_is_refused_leaves_those_that_run(driver):
    run = Slices(driver)
    (running,), _ = run(2, sample(max_tokens=12))
    (bad,), ended = run(2, sample(max_tokens=0))
    assert ended.keys() == {bad}
    assert isinstance(ended[bad], Failed)
    _, ended = run(0)
    assert tokens(ended[running]) == tokens(alone(driver, sample(max_tokens=12)))


def test_requests_beyond_the_caches_rows_wait_and_are_answered(driver):
    sampler = driver.engine.state.decoding._engine
    sampler.limits = replace(sampler.limits, max_rows=2)
    run = Slices(driver)
    payloads = [sample(max_tokens=5 + seed, seed=seed, first=40 + seed) for seed in range(5)]
    futures, answers = run(2, *payloads)
    assert len(sampler.live) <= 2
    while len(answers) < len(payloads):
        answers |= run(2)[1]
        assert len(sampler.live) <= 2
    for future, payload in zip(futures, payloads, strict=True):
        assert tokens(answers[future]) == tokens(alone(driver, payload))


def test_a_request_in_pieces_lets_a_later_one_in_between_them(driver):
    sampler = driver.engine.state.decoding._engine
    expected = tokens(alone(driver, sample(max_tokens=6, num_samples=7)))
    sampler.limits = replace(sampler.limits, max_rows=2)
    run = Slices(driver)
    (many,), _ = run(1, sample(max_tokens=6, num_samples=7))
    (one,), answers = run(1, sample(max_tokens=3, seed=8))
    order = []
    while len(answers) < 2:
        ended = run(1)[1]
        order += ended
        answers |= ended
    assert order == [one, many]
    assert tokens(answers[many]) == expected
