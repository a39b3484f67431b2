"""One rank and two give the same training: losses, per-token outputs and the saved weights that gradients led to."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.support.gang import Client, forward_backward, gang, optim_step, output_dir, settings_file

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import ForwardBackwardDone, OptimStepDone, SaveWeights, SaveWeightsDone

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

# fp32 sums over tokens are taken in another order when ranks share the rows.
LOSS_TOLERANCE = 1e-5
OUTPUT_TOLERANCE = 1e-5
# Adam's first steps divide by the root of the squared gradient, which enlarges rounding where gradients are near zero.
WEIGHT_TOLERANCE = 2e-4


async def trained(directory: Path, *, redis_url: str, engine: str, num_ranks: int):
    """Outcomes and saved arrays of the same jobs on a gang of num_ranks."""
    settings = settings_file(directory, redis_url=redis_url, engine=engine, num_ranks=num_ranks)
    async with RedisIntake(redis_url, engine=engine) as intake:
        client = Client(intake)
        model, _ = await client.create()
        futures = []
        for step in range(3):
            futures.append(await client.submit(model, forward_backward(40, 7, 25, 1, 33, seed=step)))
            futures.append(await client.submit(model, forward_backward(12, seed=10 + step)))
            futures.append(await client.submit(model, optim_step()))
        futures.append(await client.submit(model, SaveWeights(name="end")))
        with gang(settings, num_ranks=num_ranks):
            outcomes = await client.outcomes(futures)
    saved = outcomes[-1]
    assert isinstance(saved, SaveWeightsDone), saved
    folder = parse_uri(saved.path).directory(output_dir(settings))
    return outcomes[:-1], load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    one, two = tmp_path / "1", tmp_path / "2"
    one.mkdir()
    two.mkdir()
    return one, two


async def test_two_ranks_train_like_one(directories: tuple[Path, Path], redis_url: str, engine_name: str):
    one, weights_of_one = await trained(directories[0], redis_url=redis_url, engine=f"{engine_name}a", num_ranks=1)
    two, weights_of_two = await trained(directories[1], redis_url=redis_url, engine=f"{engine_name}b", num_ranks=2)
    for mine, other in zip(one, two, strict=True):
        assert type(mine) is type(other)
        assert isinstance(mine, ForwardBackwardDone | OptimStepDone), mine
        assert mine.metrics.keys() == other.metrics.keys()
        if isinstance(mine, ForwardBackwardDone):
            assert other.metrics["loss:sum"] == pytest.approx(mine.metrics["loss:sum"], rel=LOSS_TOLERANCE)
            for name, column in mine.outputs.items():
                np.testing.assert_array_equal(column.lengths_array(), other.outputs[name].lengths_array())
                np.testing.assert_allclose(
                    other.outputs[name].values(), column.values(), rtol=OUTPUT_TOLERANCE, atol=OUTPUT_TOLERANCE
                )
    assert weights_of_one.keys() == weights_of_two.keys()
    for name, array in weights_of_one.items():
        np.testing.assert_allclose(weights_of_two[name], array, atol=WEIGHT_TOLERANCE, err_msg=name)
