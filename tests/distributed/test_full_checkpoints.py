"""Checkpoints of full weights on two ranks: rank 0 reads and writes, both hold the same."""

from pathlib import Path

import pytest
from tests.support.engine_builders import MOE, cross_entropy, random_data
from tests.support.full import MODEL, full_driver
from tests.support.ranks import Ranks
from tests.support.snapshots import assert_same_state

from gradstream.engine.parallel.comm import Comm
from gradstream.engine.snapshot.state import ModelState
from gradstream.shared.wire import Failed, LoadWeights, ResetModel, SaveForSampler, SaveWeights

pytestmark = pytest.mark.gloo

URI = f"tinker://{MODEL}/weights/one"


def _run(comm: Comm, output_dir: Path, format_name: str) -> tuple[list[ModelState], list[str]]:
    """Saved, trained on, failed to load, loaded; then begun with the checkpoint, and reset to it. Each rank has a disk of its own."""
    output_dir = output_dir / str(comm.rank)
    driver = full_driver(MOE, comm, output_dir=output_dir, ckpt_manager=format_name, dtype="bfloat16")
    states, failures = [], []
    for seed in (1, 2):
        driver.done(MODEL, cross_entropy(random_data([30, 7, 12], seed=seed)))
        driver.step(MODEL, learning_rate=1e-2)
        if seed == 1:
            driver.done(MODEL, SaveWeights(name="one"))
            states += driver.engine.capture([MODEL])
    for payload in (
        SaveWeights(name="one"),
        LoadWeights(path=f"{URI}x", with_optimizer=True),
        LoadWeights(path=URI, with_optimizer=True),
        SaveForSampler(name="one"),
    ):
        failures += [outcome.code for outcome in driver.run((MODEL, payload)) if isinstance(outcome, Failed)]
    states += driver.engine.capture([MODEL])
    begun = full_driver(MOE, comm, output_dir=output_dir, dtype="bfloat16", load_checkpoint_path=URI)
    states += begun.engine.capture([MODEL])
    begun.done(MODEL, ResetModel(weights=True))
    return [*states, *begun.engine.capture([MODEL])], failures


@pytest.mark.parametrize("format_name", ["dcp", "torch"])
def test_both_ranks_hold_what_the_leader_reads(two_ranks: Ranks, tmp_path: Path, format_name: str) -> None:
    (mine, failures), (yours, others) = two_ranks.run(_run, tmp_path, format_name)
    assert failures == others == ["checkpoint_exists", "unknown_model"]
    for one, other in zip(mine, yours, strict=True):
        assert_same_state(one, other)
    saved, loaded, begun, reset = mine
    assert_same_state(saved, loaded)
    assert_same_state(saved, begun)
    assert (reset.step, reset.tensors["weights"].equal(saved.tensors["weights"])) == (0, True)
