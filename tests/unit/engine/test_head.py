"""Chunked log-probabilities against all logits at once."""

import numpy as np
import pytest
import torch
from tests.support.engine_builders import Driver, open_engine, randomize
from tests.support.full import full_driver
from tests.support.switches import Ops

from gradstream.engine import head as head_module
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.adapters.slices import AdapterSlice
from gradstream.engine.head import Head, logits, target_logprobs
from gradstream.engine.models.base import BaseModel
from gradstream.engine.vocabulary import Softmax
from gradstream.shared.ids import ModelId


@pytest.fixture(scope="module")
def driver() -> Driver:
    driver = Driver(open_engine())
    for name, rank in (("x", 3), ("y", 8)):
        driver.create(name, rank=rank)
        randomize(driver, name)
    return driver


def _pass(driver: Driver, *, with_grad: bool) -> AdapterPass:
    """Tokens 0-5 on x, 5-9 on the bare base, 9-20 on y."""
    slices = []
    for name, start, end in (("x", 0, 5), ("y", 9, 20)):
        adapter = driver.engine.state.models[ModelId(name)]
        grad = torch.zeros_like(adapter.weights) if with_grad else None
        slices.append(AdapterSlice(start=start, end=end, weights=adapter, grad=grad))
    return AdapterPass(slices, compute_dtype=torch.float32)


CHUNKS = {"one token": 1, "odd": 7 * 2048 * 4, "all": 1 << 30}


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30], ids=["recompute", "keep"])
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS.keys())
def test_values_and_gradients_equal_autograd_over_all_logits(driver: Driver, chunk_bytes: int, keep_bytes: int) -> None:
    base = driver.engine.state.base
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 64, generator=generator)
    targets = torch.randint(2048, (20, 2), generator=generator)
    grad = torch.randn(20, 2, generator=generator)
    grad[[3, 4, 12]] = 0.0

    passes = _pass(driver, with_grad=True)
    head = Head(base, hidden, passes, chunk_bytes=chunk_bytes, keep_bytes=keep_bytes)
    got = head.logprobs(targets, keep=True)
    got_grad = head.backward(grad, np.ones(20, dtype=bool))

    leaf = hidden.double().requires_grad_()
    truth = leaf @ base.head_weight.double().t()
    factors = []
    for part in passes.slices:
        assert part.weights is not None
        pair = part.weights.factors.pairs[base.head_site.index]
        a, b = pair.a.double().clone().requires_grad_(), pair.b.double().clone().requires_grad_()
        factors += [a, b]
        change = torch.zeros_like(truth)
        change[part.start : part.end] = part.weights.scale * (leaf[part.start : part.end] @ a.t()) @ b.t()
        truth = truth + change
    want = truth.log_softmax(-1).gather(1, targets)
    want_grads = torch.autograd.grad((want * grad).sum(), [leaf, *factors])

    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_grad.double(), want_grads[0], rtol=1e-4, atol=1e-5)
    assert (got_grad[[3, 4, 12]] == 0).all()
    for number, part in enumerate(passes.slices):
        assert part.weights is not None
        assert part.grad is not None
        pair = part.weights.layout.pairs(part.grad)[base.head_site.index]
        torch.testing.assert_close(pair.a.double(), want_grads[1 + 2 * number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pair.b.double(), want_grads[2 + 2 * number], rtol=1e-4, atol=1e-4)


def test_the_samplers_logits_agree_with_the_trainers_log_probabilities(driver: Driver) -> None:
    base = driver.engine.state.base
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(20) * 3
    passes = _pass(driver, with_grad=False)
    want = logits(base, hidden, passes).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(target_logprobs(base, hidden, targets, passes), want, rtol=1e-6, atol=1e-5)


def test_chunks_are_longer_where_the_weight_is_trained_up_to_a_bound_of_tokens_and_of_bytes(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * 2048 * 10)
    monkeypatch.setattr(head_module, "TRAINED_CHUNK_TOKENS", 50)
    targets, hidden = torch.zeros(100, 1, dtype=torch.int64), torch.zeros(100, 64)

    def num_chunks(base: BaseModel) -> int:
        head = Head(base, hidden, None)
        head.logprobs(targets, keep=False)
        return len(head._chunks)

    full = full_driver().engine.state.base
    assert num_chunks(driver.engine.state.base) == 10
    assert num_chunks(full) == 2
    monkeypatch.setattr(head_module, "TRAINED_CHUNK_BYTES", 4 * 2048 * 25)
    assert num_chunks(full) == 4


def test_chunks_in_which_nothing_may_learn_are_left_out_of_the_backward_pass(driver: Driver) -> None:
    base = driver.engine.state.base
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    targets, grad = torch.arange(20)[:, None], torch.zeros(20, 1)
    grad[7] = 1.0

    def backward(*learners: int) -> tuple[torch.Tensor | None, int]:
        head = Head(base, hidden, None, chunk_bytes=5 * 2048 * 4)
        head.logprobs(targets, keep=True)
        may_learn = np.zeros(20, dtype=bool)
        may_learn[list(learners)] = True
        with Ops() as ops:
            return head.backward(grad, may_learn), ops.num_products

    everywhere, num_products = backward(*range(20))
    there, num_products_there = backward(7, 8)
    assert (num_products, num_products_there) == (4, 1)
    assert everywhere is not None
    assert there is not None
    assert torch.equal(everywhere, there)
    assert backward() == (None, 0)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30], ids=["recompute", "keep"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_whose_logits_are_not_finite_is_noticed_and_leaves_the_gradients_of_others_as_they_are(
    driver: Driver, value: float, keep_bytes: int
) -> None:
    base = driver.engine.state.base
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    broken = hidden.clone()
    broken[7, 3] = value
    targets, grad = torch.arange(20)[:, None], torch.ones(20, 1)
    grad[7] = 0.0
    others = [token for token in range(20) if token != 7]

    outs = []
    for states in (hidden, broken):
        head = Head(base, states, None, keep_bytes=keep_bytes)
        outs.append((head.logprobs(targets, keep=True), head.backward(grad, np.ones(20, dtype=bool))))

    (want, want_grad), (got, got_grad) = outs
    assert not got[7].isfinite()
    assert torch.equal(got[others], want[others])
    assert torch.equal(got_grad, want_grad)
    assert (got_grad[7] == 0).all()


def test_logits_of_minus_infinity_have_no_probability_and_no_gradient() -> None:
    softmax = Softmax.of("eager")
    logits_NV = torch.tensor([[0.5, -torch.inf, 2.0], [1.0, 3.0, -1e30]])
    want = logits_NV.double().logsumexp(1)
    place_NV = logits_NV.clone()
    lse_N = softmax.lse_(place_NV)
    torch.testing.assert_close(lse_N.double(), want, rtol=1e-6, atol=1e-6)
    weight_N = torch.tensor([2.0, -1.0])
    got = softmax.weigh_(place_NV, lse_N, weight_N, True)
    fresh = softmax.weigh_(logits_NV.clone(), lse_N, weight_N, False)
    assert torch.equal(got, fresh)
    torch.testing.assert_close(got.double(), weight_N[:, None].double() * logits_NV.double().softmax(1))
