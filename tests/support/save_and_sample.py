"""A run of saves, loads and samples on one rank of a gang, whose outcomes can be compared with those of other ranks."""

from pathlib import Path

import msgspec
import numpy as np

from gradstream.engine.parallel.comm import Comm
from gradstream.shared import codec
from gradstream.shared.ids import SamplerId, SessionId
from gradstream.shared.wire import LoadWeights, Outcome, Sample, SamplingParams, SaveForSampler, SaveWeights
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data, randomize

MODEL = "s:train:0"
WEIGHTS = "tinker://s:train:0/weights/ck"
EPHEMERAL = "tinker://samplers/s:sample:0"


def sample(path: str | None, length: int, *, seed: int | None = 1, **params: object) -> Sample:
    prompt = np.arange(40, 40 + length, dtype="<i4")
    fields = {"max_tokens": 12, "seed": seed, "stop_token_ids": [], **params}
    return Sample(
        path=path, prompt=prompt.tobytes(), params=SamplingParams(**fields), num_samples=2, prompt_logprobs=True
    )


def scenario(comm: Comm, output_dir: Path) -> list[Outcome]:
    """Every kind of op of the checkpoints and the sampler, failures included."""
    driver = Driver(open_engine(comm=comm, output_dir=output_dir))
    driver.create(MODEL)
    randomize(driver, MODEL)
    data = random_data([20, 7, 15, 3])
    driver.done(MODEL, cross_entropy(data))
    driver.step(MODEL, learning_rate=1e-2)
    outcomes = [
        driver.run((MODEL, SaveWeights(name="ck"))),
        driver.run((MODEL, SaveWeights(name="ck"))),
        driver.run((MODEL, SaveForSampler(sampler_id=SamplerId("s:sample:0")))),
        driver.run((MODEL, LoadWeights(path="tinker://s:train:0/weights/none", with_optimizer=False))),
    ]
    work = [("a:sample:0", sample(EPHEMERAL if odd else None, 3 + 5 * odd, seed=odd)) for odd in range(5)]
    bad = ("a:sample:0", sample("tinker://s:train:0/weights/none", 4))
    outcomes.append(driver.run(*work, bad, ("a:sample:0", sample(None, 6, seed=None))))
    outcomes.append(driver.run(("a:sample:0", sample(WEIGHTS, 5, temperature=0.0))))
    session = SessionId("s")
    load = LoadWeights(path=WEIGHTS, with_optimizer=True, create=True, session_id=session)
    outcomes.append(driver.run(("s:train:1", load)))
    outcomes.append(driver.run(("s:train:1", cross_entropy(data, backward=False))))
    return [outcome for batch in outcomes for outcome in batch]


def run_rank(rank: int, size: int, rendezvous: str, output_dir: Path, result: Path) -> None:
    """One rank's process: the scenario, its outcomes written to result."""
    comm = Comm.join(rendezvous, rank=rank, size=size)
    try:
        encoded = [codec.encode(outcome) for outcome in scenario(comm, output_dir)]
        result.write_bytes(msgspec.msgpack.encode(encoded))
    finally:
        comm.close()


def read_outcomes(result: Path) -> list[Outcome]:
    return [codec.decode_outcome(data) for data in msgspec.msgpack.decode(result.read_bytes(), type=list[bytes])]
