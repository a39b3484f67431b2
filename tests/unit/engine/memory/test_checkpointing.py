"""Recomputed activations: the same bits from less memory."""

from functools import partial

import numpy as np
import pytest
import torch
from tests.support.engine_builders import DENSE, MOE, Driver, cross_entropy, random_data, randomize
from tests.support.graph_memory import saved_bytes, training_hidden
from tests.support.oracle import relative_error
from tests.support.switches import CPU, KINDS, Ops, driver_of, pass_of
from torch._dynamo.utils import counters

from gradstream.engine.config import Memory
from gradstream.engine.models import build
from gradstream.engine.models.compiled import compiler_refusal
from gradstream.shared.errors import Unsupported

PATHS = pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
WAYS = pytest.mark.parametrize(
    "memory",
    [
        pytest.param(
            Memory(enable_gradient_checkpointing=True),
            marks=pytest.mark.config_field("enable_gradient_checkpointing"),
            id="plain",
        ),
        pytest.param(
            Memory(enable_gradient_checkpointing=True, enable_reentrant=True),
            marks=pytest.mark.config_field("enable_reentrant"),
            id="reentrant",
        ),
    ],
)
UNITS = {DENSE: ("Qwen3MLP", "Qwen3Attention"), MOE: ("Qwen3MoeExperts", "Qwen3MoeAttention", "Embedding", "Linear")}


@PATHS
@WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_have_the_same_bits(kind, path, memory):
    plain, recomputed = pass_of(driver_of(kind, path)), pass_of(driver_of(kind, path, memory=memory))
    np.testing.assert_array_equal(recomputed[0], plain[0])
    assert torch.equal(recomputed[1], plain[1])


@WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_autograd_keeps_less_than_a_third(kind, memory):
    assert 3 * saved_bytes(driver_of(kind, memory=memory)) < saved_bytes(driver_of(kind))


@PATHS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.config_field("basic_modules")
def test_further_units_change_no_bits(kind, path):
    units = Memory(enable_gradient_checkpointing=True, basic_modules=UNITS[path])
    plain, recomputed = pass_of(driver_of(kind, path)), pass_of(driver_of(kind, path, memory=units))
    np.testing.assert_array_equal(recomputed[0], plain[0])
    assert torch.equal(recomputed[1], plain[1])


@pytest.mark.config_field("basic_modules")
def test_a_further_unit_is_computed_a_third_time():
    counts = []
    for names in ((), ("Qwen3Attention",)):
        driver = driver_of(KINDS[1], memory=Memory(enable_gradient_checkpointing=True, basic_modules=names))
        with Ops() as ops:
            pass_of(driver)
        counts.append(ops.num_products)
    # One product of q, k and v and one of the output, in each of two layers.
    assert counts[1] > counts[0]


@pytest.mark.config_field("basic_modules")
def test_a_class_that_the_model_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(
        Unsupported, match=r"^basic_modules: Qwen3ForCausalLM has no module of class Nothing; it has .*Qwen3MLP"
    ):
        driver_of(KINDS[0], memory=Memory(basic_modules=("Qwen3MLP", "Nothing")))


def test_further_units_are_refused_for_the_reentrant_kind():
    memory = Memory(enable_gradient_checkpointing=True, enable_reentrant=True, basic_modules=("Qwen3MLP",))
    with pytest.raises(Unsupported, match=r"^basic_modules: .*use enable_reentrant: false$"):
        driver_of(KINDS[0], memory=memory)


@pytest.mark.config_field("enable_reentrant")
def test_the_reentrant_kind_is_torchs():
    def kinds(memory: Memory) -> set[str]:
        found, todo = set(), [training_hidden(driver_of(KINDS[0], memory=memory)).grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in found:
                found.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return {node.name() for node in found}

    assert "CheckpointFunctionBackward" in kinds(Memory(enable_gradient_checkpointing=True, enable_reentrant=True))
    assert "CheckpointFunctionBackward" not in kinds(Memory(enable_gradient_checkpointing=True))


@WAYS
def test_rows_of_several_adapters_are_recomputed_with_their_own(memory):
    def grads(chosen: Memory) -> list[torch.Tensor]:
        driver = driver_of(KINDS[0], memory=chosen)
        driver.create("other", rank=3, seed=5)
        randomize(driver, "other", seed=9)
        driver.run(("default", cross_entropy(random_data([9, 4]))), ("other", cross_entropy(random_data([7], seed=1))))
        return [driver.grad("default"), driver.grad("other")]

    for got, want in zip(grads(memory), grads(Memory()), strict=True):
        assert bool(want.any())
        assert torch.equal(got, want)


@WAYS
def test_a_forward_computes_nothing_twice(memory):
    def products(chosen: Memory) -> int:
        driver: Driver = driver_of(KINDS[0], memory=chosen)
        with Ops() as ops:
            driver.done("default", cross_entropy(random_data([20]), backward=False))
        return ops.num_products

    assert products(memory) == products(Memory())


@pytest.mark.timeout(1800)
@pytest.mark.skipif(compiler_refusal(CPU) is not None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.config_field("basic_modules")
def test_compiled_layers_are_recomputed_too_and_units_outside_them_are_compiled(kind, monkeypatch):
    """With the backend of torch that makes graphs and no kernels, which takes seconds."""
    monkeypatch.setattr(build, "compile_layers", partial(build.compile_layers, backend="aot_eager"))
    found, graphs = [], []
    for memory in (
        Memory(),
        Memory(enable_gradient_checkpointing=True),
        Memory(enable_gradient_checkpointing=True, enable_reentrant=True),
        Memory(enable_gradient_checkpointing=True, basic_modules=("Qwen3RMSNorm",)),
    ):
        torch._dynamo.reset()
        counters.clear()
        found.append(pass_of(driver_of(kind, memory=memory, enable_compile=True)))
        graphs.append(counters["stats"]["unique_graphs"])
    for logprobs, grad in found[1:3]:
        np.testing.assert_array_equal(logprobs, found[0][0])
        assert torch.equal(grad, found[0][1])
    np.testing.assert_allclose(found[3][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert relative_error(found[3][1], found[0][1]) < 1e-5
    assert graphs[3] > graphs[1]
