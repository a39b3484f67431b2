"""Products by oneDNN: right, the same each time, and chosen by what is known beforehand."""

import subprocess
import sys

import pytest
import torch
from tests.support.oracle import relative_error
from torch import nn

from gradstream.engine.models.full_linear import trained_linear
from gradstream.engine.products import FrozenProducts, add_mm_, frozen_products, library, linear, mm

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(
    library(CPU, torch.float32) != "onednn", reason="this processor or this build of torch has no products by oneDNN"
)
# Below and above the size from which oneDNN pays.
SIZES = [(3, 40, 5), (100, 130, 90), (8, 300, 500), (700, 200, 8), (1, 1500, 1000)]


def _strided(num_rows: int, num_columns: int, layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    match layout:
        case "dense":
            return torch.randn(num_rows, num_columns, generator=generator)
        case "transposed":
            return torch.randn(num_columns, num_rows, generator=generator).t()
        case "columns of a wider one":
            return torch.randn(num_rows, num_columns + 7, generator=generator)[:, 3:-4]
    return torch.randn(num_columns + 7, num_rows, generator=generator)[3:-4].t()


LAYOUTS = ["dense", "transposed", "columns of a wider one", "rows of a wider one, transposed"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("left_layout", LAYOUTS)
@pytest.mark.parametrize("right_layout", LAYOUTS)
def test_products_in_any_strides_are_those_of_double_precision(size, left_layout, right_layout):
    num_rows, inner, num_columns = size
    left, right = _strided(num_rows, inner, left_layout), _strided(inner, num_columns, right_layout)
    expected = left.double() @ right.double()
    assert relative_error(mm(left, right), expected) < 1e-6
    target = torch.ones(num_columns, num_rows).t()
    add_mm_(target, left, right, 0.5)
    assert relative_error(target, 1 + 0.5 * expected) < 1e-6


def test_a_bias_with_gaps_is_added_number_by_number():
    x, weight = _strided(100, 130, "dense"), _strided(90, 130, "dense")
    bias = torch.arange(180.0)[::2]
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert relative_error(linear(x, weight, bias), expected) < 1e-6


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 300])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_a_linear_layer_has_the_values_and_gradients_of_double_precision(num_tokens, with_bias):
    generator = torch.Generator().manual_seed(num_tokens)
    x, weight = (torch.randn(size, 96, generator=generator) for size in (num_tokens, 128))
    bias = torch.randn(128, generator=generator) if with_bias else None
    seed = torch.randn(1, num_tokens, 128, generator=generator)
    ours = [part.requires_grad_() for part in (x[None].clone(), weight.clone(), bias) if part is not None]
    theirs = [part.detach().double().requires_grad_() for part in ours]
    outs = [trained_linear(*ours), nn.functional.linear(*theirs)]
    outs[0].backward(seed)
    outs[1].backward(seed.double())
    pairs = [(linear(x, weight, bias)[None], outs[1]), tuple(outs)]
    pairs += [(own.grad, other.grad) for own, other in zip(ours, theirs, strict=True)]
    for got, want in pairs:
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_same_product_has_the_same_bits_each_time_wherever_its_factors_lie(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        first: dict[tuple[int, int, int], torch.Tensor] = {}
        for offset in (0, 1, 5, 16):
            for size in SIZES:
                num_rows, inner, num_columns = size
                generator = torch.Generator().manual_seed(num_rows)
                memory = torch.empty(num_rows * inner + offset)[offset:]
                left = memory.view(num_rows, inner).copy_(torch.randn(num_rows, inner, generator=generator))
                product = mm(left, torch.randn(inner, num_columns, generator=generator))
                assert torch.equal(product, first.setdefault(size, product)), size
    finally:
        torch.set_num_threads(before)


@needs_onednn
def test_only_large_products_of_float32_on_a_cpu_go_through_onednn():
    large, small = torch.ones(200, 200), torch.ones(20, 20)
    with torch.profiler.profile() as profile:
        for one in (large, small, large.bfloat16(), large.double()):
            mm(one, one)
            linear(one, one, None)
            add_mm_(one.clone(), one, one)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mkldnn::_linear_pointwise"] == 3
    assert library(CPU, torch.bfloat16) == library(CPU, torch.float64) == "torch"
    assert library(torch.device("cuda"), torch.float32) == "torch"


def test_gradients_in_float32_take_products_of_bfloat16():
    left, right = torch.randn(200, 100).bfloat16(), torch.randn(100, 90).bfloat16()
    target = torch.zeros(200, 90)
    add_mm_(target, left, right, 2.0)
    assert relative_error(target, 2 * (left.double() @ right.double())) < 1e-2


@needs_onednn
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33, 100])
@pytest.mark.parametrize(("num_out", "num_in"), [(48, 32), (1000, 700), (12_000, 400)])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("max_packed_bytes", [1 << 30, 0], ids=["arranged", "as it lies"])
def test_products_with_frozen_weights_are_those_of_double_precision(
    num_tokens, num_out, num_in, with_bias, max_packed_bytes
):
    generator = torch.Generator().manual_seed(num_tokens)
    x, weight = (torch.randn(size, num_in, generator=generator) for size in (num_tokens, num_out))
    bias = torch.randn(num_out, generator=generator) if with_bias else None
    frozen = FrozenProducts(max_packed_bytes=max_packed_bytes)
    expected = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for _ in range(2):
        torch.testing.assert_close(frozen.linear(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-5)


@needs_onednn
def test_the_same_frozen_product_has_the_same_bits_whichever_object_computes_it():
    x, weight = torch.randn(9, 600), torch.randn(700, 600)
    assert torch.equal(FrozenProducts().linear(x, weight, None), FrozenProducts().linear(x, weight, None))


@needs_onednn
def test_copies_of_weights_stay_within_their_bound():
    frozen = FrozenProducts(max_packed_bytes=3 * 700 * 600 * 4)
    weights = [torch.randn(700, 600) for _ in range(5)]
    for weight in weights:
        frozen.linear(torch.randn(9, 600), weight, None)
    assert len(frozen._packed) == 3


def test_models_in_other_dtypes_keep_the_products_of_torch():
    assert frozen_products(torch.empty(1, dtype=torch.bfloat16)) is None
    assert frozen_products(torch.empty(1, dtype=torch.float64)) is None


# Rows of 400 lengths through one layer; prints by how many MB the process grew.
MANY_LENGTHS = """
import psutil, torch
from gradstream.engine.products import bound_kernels, linear
bound_kernels()
weight = torch.ones(64, 64)
def run(num_tokens):
    linear(torch.ones(num_tokens, 64), weight, None)
run(300)
before = psutil.Process().memory_info().rss
for num_tokens in range(300, 700):
    run(num_tokens)
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@needs_onednn
def test_rows_of_ever_new_lengths_do_not_fill_memory_with_kernels():
    done = subprocess.run([sys.executable, "-c", MANY_LENGTHS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
