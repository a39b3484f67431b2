import numpy as np
import pytest
import torch

from gradstream.engine.sampler.choice import (
    Choice,
    _filtered,
    choose,
    key_of,
    scaled_logits,
    scaled_logprobs,
    uniform,
)

V = 12
NUM_DRAWS = 20_000
LOGITS_V = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2


def reference(logits_V, choice):
    """The distribution to draw from, in double precision, written out step by step."""
    scaled = logits_V.double().numpy() / choice.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    if choice.top_k > 0:
        order = order[: choice.top_k]
    mass = sum(probs[token] for token in order)
    kept, total = [], 0.0
    for token in order:
        kept.append(token)
        total += probs[token] / mass
        if total >= choice.top_p:
            break
    out = np.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


def scaled_probs(logits_BV, choices):
    return torch.softmax(scaled_logits(logits_BV, choices), dim=-1)


def draw(logits_V, choice, *, seed):
    """NUM_DRAWS tokens as one batch of equal rows, each with its own random number."""
    key = key_of(seed=seed, job="", sample_index=0)
    probs_BV = scaled_probs(logits_V.expand(NUM_DRAWS, -1), [choice] * NUM_DRAWS)
    return choose(probs_BV, [choice] * NUM_DRAWS, [uniform(key, index) for index in range(NUM_DRAWS)])


@pytest.mark.parametrize(
    "choice",
    [
        Choice(temperature=1.0, top_k=-1, top_p=1.0),
        Choice(temperature=0.5, top_k=-1, top_p=1.0),
        Choice(temperature=2.0, top_k=-1, top_p=1.0),
        Choice(temperature=1.0, top_k=3, top_p=1.0),
        Choice(temperature=1.0, top_k=1, top_p=1.0),
        Choice(temperature=1.0, top_k=V + 5, top_p=1.0),
        Choice(temperature=1.0, top_k=-1, top_p=0.7),
        Choice(temperature=1.0, top_k=-1, top_p=1e-9),
        Choice(temperature=1.5, top_k=6, top_p=0.8),
    ],
    ids=lambda choice: f"t{choice.temperature} k{choice.top_k} p{choice.top_p}",
)
def test_tokens_are_drawn_as_often_as_the_double_precision_distribution_says(choice):
    expected = reference(LOGITS_V, choice)
    counts = np.bincount(draw(LOGITS_V, choice, seed=1).numpy(), minlength=V)
    assert counts[expected == 0].sum() == 0
    spread = np.sqrt(NUM_DRAWS * expected * (1 - expected))
    assert np.all(np.abs(counts - NUM_DRAWS * expected) <= 4 * spread + 1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(-1, 0.5), (-1, 0.999), (1, 1.0), (63, 1.0), (64, 0.9), (65, 1.0), (700, 0.8), (999, 1.0), (5000, 0.3)],
)
def test_the_tokens_kept_are_those_of_a_full_sort_whatever_the_size_of_the_set(spread, top_k, top_p):
    # Few distinct values, so that ties fall on the border.
    logits_BV = (torch.randn(3, 1000, generator=torch.Generator().manual_seed(4)) * 4).round() * spread
    choice = Choice(temperature=1.0, top_k=top_k, top_p=top_p)
    probs_BV = scaled_logprobs(logits_BV, [choice] * 3).double().exp()
    kept_BV = _filtered(probs_BV, [choice] * 3) > 0
    for probs_V, kept_V in zip(probs_BV, kept_BV, strict=True):
        order = sorted(range(1000), key=lambda token: (-probs_V[token].item(), token))
        order = order[:top_k] if top_k > 0 else order
        num_kept = int(kept_V.sum())
        assert kept_V.nonzero()[:, 0].tolist() == sorted(order[:num_kept])
        mass = probs_V[order].sum()
        assert probs_V[order[:num_kept]].sum() >= min(top_p, 1 - 1e-9) * mass * (1 - 1e-12)
        assert probs_V[order[: num_kept - 1]].sum() < top_p * mass * (1 + 1e-12) or num_kept == 1


def test_rows_with_different_filters_are_cut_each_by_its_own():
    probs_BV = torch.rand(4, 300, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    choices = [Choice(temperature=1.0, top_k=k, top_p=p) for k, p in [(3, 1.0), (-1, 0.2), (200, 0.99), (1, 0.1)]]
    together = _filtered(probs_BV, choices)
    for row, choice in enumerate(choices):
        assert torch.equal(together[row], _filtered(probs_BV[row : row + 1], [choice])[0])


def test_temperature_zero_takes_the_most_likely_token_and_reports_it_at_temperature_one():
    greedy = Choice(temperature=0.0, top_k=-1, top_p=1.0)
    assert choose(scaled_probs(LOGITS_V[None], [greedy]), [greedy], [0.99]).item() == LOGITS_V.argmax().item()
    torch.testing.assert_close(scaled_logprobs(LOGITS_V[None], [greedy])[0], LOGITS_V.log_softmax(-1))


def test_equal_logits_at_the_edge_of_top_k_keep_the_lower_ids():
    flat = torch.zeros(V)
    drawn = draw(flat, Choice(temperature=1.0, top_k=3, top_p=1.0), seed=5)
    assert set(drawn.tolist()) == {0, 1, 2}


def test_reported_logprobs_are_those_of_the_scaled_distribution_whatever_the_filters_say():
    choice = Choice(temperature=0.5, top_k=2, top_p=0.3)
    torch.testing.assert_close(scaled_logprobs(LOGITS_V[None], [choice])[0], (LOGITS_V / 0.5).log_softmax(-1))


def test_a_row_draws_the_same_token_alone_as_among_others():
    choices = [
        Choice(temperature=t, top_k=k, top_p=p) for t, k, p in [(1, -1, 1), (0, -1, 1), (0.7, 4, 0.9), (1.3, -1, 0.8)]
    ]
    logits_BV = torch.randn(4, V, generator=torch.Generator().manual_seed(9))
    uniforms = [0.3, 0.9, 0.55, 0.999]
    together = choose(scaled_probs(logits_BV, choices), choices, uniforms)
    for row, choice in enumerate(choices):
        alone = choose(scaled_probs(logits_BV[row : row + 1], [choice]), [choice], [uniforms[row]])
        assert alone.item() == together[row].item()


def test_a_number_just_below_one_never_draws_a_token_of_no_probability():
    logits = torch.tensor([0.0, 1.0, -torch.inf, -torch.inf])
    choice = Choice(temperature=1.0, top_k=-1, top_p=1.0)
    assert choose(scaled_probs(logits[None], [choice]), [choice], [1.0]).item() == 1


def test_keys_depend_on_the_seed_or_else_on_the_job_and_always_on_the_sample():
    same = key_of(seed=1, job="a:0", sample_index=0)
    assert key_of(seed=1, job="b:7", sample_index=0) == same
    assert key_of(seed=1, job="a:0", sample_index=1) != same
    assert key_of(seed=2, job="a:0", sample_index=0) != same
    assert key_of(seed=None, job="a:0", sample_index=0) != key_of(seed=None, job="a:1", sample_index=0)


def test_uniform_numbers_fill_the_unit_interval():
    numbers = np.array([uniform(b"k" * 16, index) for index in range(NUM_DRAWS)])
    counts, _ = np.histogram(numbers, bins=20, range=(0.0, 1.0))
    assert counts.sum() == NUM_DRAWS
    assert np.abs(counts - NUM_DRAWS / 20).max() < 4 * np.sqrt(NUM_DRAWS / 20)


@pytest.mark.parametrize("num_tokens", [1, 100, 128, 129, 1000, 4096])
def test_a_token_is_where_its_number_falls_in_the_running_sum_over_the_whole_vocabulary(num_tokens):
    generator = torch.Generator().manual_seed(8)
    probs_BV = torch.softmax(torch.randn(200, num_tokens, generator=generator) * 3, dim=-1)
    # Stretches of nothing, in the middle and at the end, longer than what is summed at a time.
    probs_BV[100:, 10:300] = 0.0
    probs_BV[100:, 900:] = 0.0
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    choice = Choice(temperature=1.0, top_k=-1, top_p=1.0)
    found_B = choose(probs_BV, [choice] * 200, uniforms.tolist())
    ends_BV = probs_BV.double().cumsum(-1)
    expected_B = torch.searchsorted(ends_BV, (uniforms * ends_BV[:, -1])[:, None], right=True)[:, 0]
    assert found_B.tolist() == expected_B.tolist()
