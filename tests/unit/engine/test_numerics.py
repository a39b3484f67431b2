"""Dtypes and determinism."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.engine_builders import MOE, Driver, cross_entropy, logprobs_of, open_engine, random_data, randomize

from gradstream.engine import numerics
from gradstream.engine.config import DTypePolicy, Numerics
from gradstream.engine.numerics import resolve_dtype


@pytest.mark.parametrize(
    ("policy", "device", "want"),
    [
        (DTypePolicy.AUTO, "cpu", torch.float32),
        (DTypePolicy.AUTO, "cuda", torch.bfloat16),
        (DTypePolicy.BFLOAT16, "cpu", torch.bfloat16),
        (DTypePolicy.FLOAT32, "cuda", torch.float32),
    ],
)
def test_the_dtype_follows_the_policy_and_the_device(policy: DTypePolicy, device: str, want: torch.dtype) -> None:
    assert resolve_dtype(policy, torch.device(device)) is want


def test_a_half_precision_base_trains_fp32_adapters_near_the_fp32_gradient() -> None:
    data = random_data([20, 9])
    grads, logprobs = {}, {}
    for policy in (DTypePolicy.FLOAT32, DTypePolicy.BFLOAT16):
        driver = Driver(open_engine(dtype=policy))
        driver.create("m")
        randomize(driver, "m")
        logprobs[policy] = np.concatenate(logprobs_of(driver.done("m", cross_entropy(data))))
        grads[policy] = driver.grad("m")
        driver.step("m", learning_rate=1e-4)
        assert driver.weights("m").dtype is torch.float32
    np.testing.assert_allclose(logprobs[DTypePolicy.BFLOAT16], logprobs[DTypePolicy.FLOAT32], atol=0.5)
    similarity = torch.cosine_similarity(grads[DTypePolicy.BFLOAT16], grads[DTypePolicy.FLOAT32], dim=0)
    assert similarity > 0.97


def test_two_engines_give_the_same_bits() -> None:
    weights = []
    for _ in range(2):
        driver = Driver(open_engine(), row_budget_tokens=40)
        for name in ("a", "b"):
            driver.create(name)
        for step in range(3):
            driver.run(*((name, cross_entropy(random_data([30, 8, 13], seed=step))) for name in ("a", "b")))
            driver.step("a", learning_rate=1e-2)
            driver.step("b", learning_rate=1e-3)
        weights.append(torch.cat([driver.weights("a"), driver.weights("b")]))
    assert torch.equal(weights[0], weights[1])


def facts_of(**changes: object) -> dict[str, str]:
    return dict(part.split("=", 1) for part in open_engine(**changes).card(epoch=1).fingerprint.split())


def test_the_fingerprint_names_what_automatic_choices_came_to() -> None:
    facts = facts_of(path=MOE)
    assert (facts["attention"], facts["moe_implementation"]) == ("segment_sdpa", "eager")
    assert "compiler" not in facts
    assert facts_of(path=MOE, numerics=Numerics(moe_implementation="native"))["moe_implementation"] == "native"


def test_the_fingerprint_names_the_compiler_where_something_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "compiler_version", lambda: "12.2")
    engine = open_engine()
    config = replace(engine.state.config, numerics=replace(engine.state.config.numerics, enable_compile=True))
    assert " compiler=12.2" in numerics.fingerprint(config, engine.state.base, engine.state.comm)
