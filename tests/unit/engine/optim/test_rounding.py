"""Stochastic rounding: the random numbers behind it, and what it makes of a value."""

import hashlib

import numpy as np
import pytest
import torch

from gradstream.engine.optim._rounding import Noise, rounded

CPU = torch.device("cpu")
NOISE = Noise.of(seed=1, model_id="m", step=7)


def draw(noise: Noise, start: int, count: int, name: str = "weights") -> torch.Tensor:
    return noise.bits(name, start, count, device=CPU)


def by_plain_numbers(key: bytes, name: str, place: int) -> int:
    """The same hash with Python's unbounded integers."""
    word = 2**32
    digest = hashlib.blake2b(f"{place // word}:{name}".encode(), key=key, digest_size=8).digest()
    x = (place + int.from_bytes(digest[:4], "little")) % word
    x ^= x >> 16
    x = (x * 0x7FEB352D + int.from_bytes(digest[4:], "little")) % word
    x ^= x >> 15
    x = (x * 0x846CA68B) % word
    return x >> 16


@pytest.mark.parametrize("start", [0, 12345, 2**31 - 3, 2**32 - 4, 5 * 2**32 + 9])
def test_the_numbers_are_those_of_the_hash_in_plain_integers(start: int) -> None:
    want = [by_plain_numbers(NOISE.key, "weights", start + i) for i in range(8)]
    assert draw(NOISE, start, 8).tolist() == want


def test_a_number_depends_on_its_place_and_not_on_what_is_drawn_with_it() -> None:
    whole = draw(NOISE, 0, 1000)
    assert torch.equal(torch.cat([draw(NOISE, 0, 17), draw(NOISE, 17, 983)]), whole)


def test_other_steps_models_seeds_and_tensors_have_unrelated_numbers() -> None:
    one = draw(NOISE, 0, 4096).double()
    others = [
        draw(Noise.of(seed=1, model_id="m", step=8), 0, 4096),
        draw(Noise.of(seed=1, model_id="n", step=7), 0, 4096),
        draw(Noise.of(seed=2, model_id="m", step=7), 0, 4096),
        draw(NOISE, 0, 4096, "exp_avg"),
        draw(NOISE, 1, 4096),
        draw(NOISE, 2**32, 4096),
    ]
    for other in others:
        # Five standard deviations of the correlation of independent numbers.
        assert abs(float(torch.corrcoef(torch.stack([one, other.double()]))[0, 1])) < 5 / 64


def test_the_numbers_spread_evenly_over_their_range() -> None:
    counts = torch.bincount(draw(NOISE, 0, 1 << 20) >> 8, minlength=256).double()
    expected = (1 << 20) / 256
    assert len(counts) == 256
    # Chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert 255 - 5 * 22.6 < float(((counts - expected) ** 2 / expected).sum()) < 255 + 5 * 22.6


VALUES = [1.001, -1.001, 3e-3, -7.77e-20, 2.5e37, 1e-39]


@pytest.mark.parametrize("value", VALUES)
def test_a_value_becomes_one_of_its_two_neighbours_and_on_average_itself(value: float) -> None:
    values = torch.full((1 << 16,), value)
    got = rounded(values, torch.bfloat16, draw(NOISE, 0, 1 << 16)).double()
    low, high = float(got.min()), float(got.max())
    assert low < float(values[0]) < high
    assert set(got.tolist()) == {low, high}
    deviation = (high - low) / 2 / 2**8
    assert abs(float(got.mean()) - float(values[0])) < 5 * deviation


def test_neighbours_are_next_to_each_other() -> None:
    values = torch.tensor(VALUES)
    nearest = values.bfloat16()
    for noise in (0, 65535):
        got = rounded(values, torch.bfloat16, torch.full((len(VALUES),), noise, dtype=torch.int32))
        apart = (got.view(torch.int16) - nearest.view(torch.int16)).abs()
        assert apart.max() <= 1


def test_what_bf16_can_hold_and_what_is_not_finite_stays() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), 2.0**-130])
    for noise in (0, 1, 65535):
        got = rounded(special, torch.bfloat16, torch.full((7,), noise, dtype=torch.int32))
        np.testing.assert_array_equal(got.float().numpy(), special.numpy())
        assert torch.equal(got.float().signbit(), special.signbit())
    all_ones = torch.full((3,), -1, dtype=torch.int32).view(torch.float32)
    assert rounded(all_ones, torch.bfloat16, torch.full((3,), 9, dtype=torch.int32)).isnan().all()


def test_float32_is_stored_as_it_is() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounded(values, torch.float32), values)
