"""What is made by a compiler: the same numbers as without, and a clear refusal where there is none."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch._inductor.config
from tests.support.engine_builders import DENSE, MOE
from tests.support.oracle import relative_error
from tests.support.switches import CPU, KINDS, base_of, driver_of, pass_of
from torch._dynamo.utils import counters

from gradstream.engine.models import build
from gradstream.engine.models.compiled import compiled, compiler_refusal
from gradstream.engine.models.fused import rotate, silu_gate
from gradstream.engine.vocabulary import Softmax, warm_up
from gradstream.shared.errors import Unsupported

needs_compiler = pytest.mark.skipif(compiler_refusal(CPU) is not None, reason="needs a C++ compiler")
# A compilation takes from ten seconds to minutes on a busy machine.
slow = [needs_compiler, pytest.mark.slow, pytest.mark.timeout(1800)]
quiet = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")
pytestmark = quiet


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """torch looks for compilers of names that nothing has."""
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        pytest.param("activation_native", False, "true", marks=pytest.mark.config_field("activation_native")),
        pytest.param("rope_native", False, "true", marks=pytest.mark.config_field("rope_native")),
        pytest.param("enable_compile", True, "false", marks=pytest.mark.config_field("enable_compile")),
        pytest.param("ce_mode", "compiled", "eager", marks=pytest.mark.config_field("ce_mode")),
    ],
)
def test_without_a_compiler_the_setting_that_needs_one_is_refused_with_the_one_that_does_not(field, value, instead):
    with pytest.raises(Unsupported, match=rf"^{field}: .*C\+\+ compiler.*none was found; use {instead}$"):
        base_of(DENSE, **{field: value})


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_defaults_of_a_cpu_still_run():
    assert base_of(DENSE, rmsnorm_native=False).num_layers == 2


@pytest.mark.config_field("activation_native", "rope_native")
class TestKernels:
    pytestmark = slow

    def test_a_gate_and_a_rotary_embedding_as_one_kernel_and_their_gradients(self):
        for function, shapes in (
            (silu_gate, ((9, 16), (9, 16))),
            (rotate, ((1, 4, 9, 8), (1, 2, 9, 8), (1, 9, 8), (1, 9, 8))),
        ):
            inputs = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
            doubles = [value.detach().double().requires_grad_() for value in inputs]
            outs = []
            for run, values in ((compiled(function), inputs), (function, doubles)):
                out = run(*values)
                parts = out if isinstance(out, tuple) else (out,)
                total = sum((part * part.detach().cos()).sum() for part in parts)
                outs.append([*parts, *torch.autograd.grad(total, values)])
            for got, want in zip(*outs, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.config_field("ce_mode")
class TestCrossEntropy:
    pytestmark = slow

    def test_the_compiled_softmax_and_its_gradient_equal_double_precision(self):
        warm_up(2048, CPU)
        for num_tokens in (1, 2, 33):
            logits, weight = random(num_tokens, 2048) * 5, random(num_tokens, seed=1)
            weight[0] = 0.0
            softmax = Softmax.of("compiled")
            lse = softmax.lse_(logits)
            torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
            want = logits.double().softmax(-1) * weight.double()[:, None]
            got = softmax.weigh_(logits, lse, weight, True)
            assert got.data_ptr() == logits.data_ptr()
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
            assert (got[0] == 0).all()


@needs_compiler
@pytest.mark.timeout(1800)
@pytest.mark.config_field("enable_compile")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_become_graphs_around_adapters_experts_and_attention(kind, monkeypatch):
    """With the backend of torch that makes graphs and no kernels, which takes seconds."""
    monkeypatch.setattr(build, "compile_layers", partial(build.compile_layers, backend="aot_eager"))
    eager = pass_of(driver_of(kind, MOE))
    torch._dynamo.reset()
    counters.clear()
    got = pass_of(driver_of(kind, MOE, enable_compile=True))
    assert counters["stats"]["unique_graphs"] >= 4
    np.testing.assert_allclose(got[0], eager[0], rtol=1e-5, atol=1e-5)
    assert relative_error(got[1], eager[1]) < 1e-5


@pytest.mark.config_field("enable_compile")
class TestLayers:
    pytestmark = slow

    @pytest.mark.parametrize("kind", KINDS)
    def test_compiled_layers_give_the_same_numbers_whatever_came_before(self, kind):
        eager = pass_of(driver_of(kind))
        first = driver_of(kind, enable_compile=True)
        got = pass_of(first)
        np.testing.assert_allclose(got[0], eager[0], rtol=1e-4, atol=1e-4)
        assert relative_error(got[1], eager[1]) < 1e-4
        second = driver_of(kind, enable_compile=True)
        for lengths in ((3,), (1,), (70, 5)):
            pass_of(second, lengths)
            second.step("default", learning_rate=0.0)
        again = pass_of(second)
        np.testing.assert_array_equal(again[0], got[0])
        assert torch.equal(again[1], got[1])
