"""Runs of unequal lengths laid out as if each had the most tokens."""

import pytest
import torch

from gradstream.engine.padding import Collect, Padding, Spread

# First tokens and lengths of runs in a row of 12 tokens.
RUNS = {
    "the whole row": ([0, 3, 4], [3, 1, 8]),
    "a part": ([2, 7], [4, 1]),
    "with gaps and out of order": ([9, 0, 4], [1, 2, 4]),
}


def _padding(name: str) -> Padding:
    starts, lengths = RUNS[name]
    return Padding.of(starts, lengths, num_tokens=12)


@pytest.mark.parametrize("name", RUNS)
def test_each_run_has_its_tokens_and_then_its_last_one_again(name: str) -> None:
    starts, lengths = RUNS[name]
    padding = _padding(name)
    x_X = torch.arange(24.0).view(12, 2)

    spread = padding.spread(x_X)

    assert spread.shape == (len(starts), max(lengths), 2)
    own = [x_X[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    for got, want in zip(spread, own, strict=True):
        assert torch.equal(got[: len(want)], want)
        assert (got[len(want) :] == want[-1]).all()
    assert torch.equal(padding.collect(spread), torch.cat(own))
    assert torch.equal(x_X[padding.token_T], torch.cat(own))
    assert padding.is_own_AN.sum() == sum(lengths)
    assert padding.is_whole == (name == "the whole row")


@pytest.mark.parametrize("name", RUNS)
def test_gradients_equal_those_of_a_function_of_each_run(name: str) -> None:
    starts, lengths = RUNS[name]
    padding = _padding(name)
    x_X = torch.randn(12, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seed_T = torch.randn(sum(lengths), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    out_T = Collect.apply(Spread.apply(x_X, padding).cumsum(1), padding)

    want_T = torch.cat([x_X[start : start + length].cumsum(0) for start, length in zip(starts, lengths, strict=True)])
    torch.testing.assert_close(out_T, want_T)
    (got,), (want,) = (torch.autograd.grad(out, x_X, seed_T) for out in (out_T, want_T))
    torch.testing.assert_close(got, want)
