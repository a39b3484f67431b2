"""router_fp32 and lm_head_fp32: where a model in bfloat16 has logits that are not rounded to it."""

import numpy as np
import pytest
import torch
from tests.support.adapters import noisy_adapter
from tests.support.engine_builders import DENSE, MOE
from tests.support.switches import base_of, hidden_of

from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.adapters.slices import AdapterSlice
from gradstream.engine.head import Head, logits, target_logprobs
from gradstream.engine.models.routers import routers

HALF = torch.bfloat16


def router_passes(*, router_fp32: bool) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(hidden states, weight, logits) of each router."""
    base = base_of(MOE, dtype=HALF, router_fp32=router_fp32)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for router in routers(base.causal_lm):
        router.register_forward_hook(lambda module, args, out: seen.append((args[0], module.weight, out[0])))
    hidden_of(base)
    assert len(seen) == base.num_layers
    return seen


@pytest.mark.config_field("router_fp32")
def test_router_logits_are_float32_products_of_the_bfloat16_values():
    for hidden, weight, got in router_passes(router_fp32=True):
        assert (hidden.dtype, weight.dtype, got.dtype) == (HALF, HALF, torch.float32)
        torch.testing.assert_close(got.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.config_field("router_fp32")
def test_without_it_router_logits_are_rounded_to_bfloat16():
    for hidden, weight, got in router_passes(router_fp32=False):
        assert got.dtype is HALF
        assert not torch.allclose(got.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)


def test_a_router_in_float32_changes_nothing_in_a_float32_model():
    on, off = (hidden_of(base_of(MOE, router_fp32=value)) for value in (True, False))
    assert torch.equal(on, off)


@pytest.mark.config_field("lm_head_fp32")
def test_vocabulary_logits_are_float32_products_or_rounded_to_bfloat16():
    for is_wide in (True, False):
        base = base_of(DENSE, dtype=HALF, lm_head_fp32=is_wide)
        hidden = hidden_of(base)
        want = hidden.double() @ base.head_weight.double().t()
        got = logits(base, hidden, None)
        assert got.dtype is torch.float32
        assert torch.equal(got, got.to(HALF).float()) is not is_wide
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-4) is is_wide


@pytest.mark.config_field("lm_head_fp32")
def test_an_adapters_part_of_the_logits_is_not_rounded_either_and_training_and_sampling_agree():
    base = base_of(DENSE, dtype=HALF)
    adapter = noisy_adapter(base)
    hidden = hidden_of(base)
    part = AdapterSlice(start=3, end=17, weights=adapter)
    adapters = AdapterPass([part], compute_dtype=HALF)
    got = logits(base, hidden, adapters)
    (patch,) = adapters.patches(base.head_site.index)
    want = hidden.double() @ base.head_weight.double().t()
    a, b = (factor.double() for factor in patch.weight)
    want[3:17] += patch.scale * (hidden[3:17].double() @ a.t()) @ b.t()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    targets = torch.arange(24)
    logprobs = got.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(target_logprobs(base, hidden, targets, adapters), logprobs, rtol=1e-5, atol=1e-5)


def test_the_gradient_through_a_wide_head_is_that_of_double_precision():
    base = base_of(DENSE, dtype=HALF)
    hidden = hidden_of(base)
    targets = torch.arange(24)[:, None]
    head = Head(base, hidden, None)
    head.logprobs(targets, keep=True)
    got = head.backward(torch.ones(24, 1), np.ones(24, dtype=bool))
    leaf = hidden.double().requires_grad_()
    (leaf @ base.head_weight.double().t()).log_softmax(-1).gather(1, targets).sum().backward()
    assert got.dtype is HALF
    similarity = torch.cosine_similarity(got.double().flatten(), leaf.grad.flatten(), dim=0)
    assert similarity > 0.9999
