import pytest
import torch
from torch import nn

from gradstream.engine.products import FrozenProducts, frozen_products

needs_onednn = pytest.mark.skipif(
    frozen_products(torch.empty(1)) is None, reason="this processor or this build of torch has no products by oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33, 100])
@pytest.mark.parametrize(("num_out", "num_in"), [(48, 32), (1000, 700), (12_000, 400)])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("max_packed_bytes", [1 << 30, 0], ids=["arranged", "as it lies"])
def test_products_are_those_of_double_precision(num_tokens, num_out, num_in, with_bias, max_packed_bytes):
    generator = torch.Generator().manual_seed(num_tokens)
    x, weight = (torch.randn(size, num_in, generator=generator) for size in (num_tokens, num_out))
    bias = torch.randn(num_out, generator=generator) if with_bias else None
    products = FrozenProducts(max_packed_bytes=max_packed_bytes)
    expected = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for _ in range(2):
        torch.testing.assert_close(products.linear(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-5)


@needs_onednn
def test_the_same_product_has_the_same_bits_whichever_object_computes_it():
    x, weight = torch.randn(9, 600), torch.randn(700, 600)
    assert torch.equal(FrozenProducts().linear(x, weight, None), FrozenProducts().linear(x, weight, None))


@needs_onednn
def test_copies_of_weights_stay_within_their_bound():
    products = FrozenProducts(max_packed_bytes=3 * 700 * 600 * 4)
    weights = [torch.randn(700, 600) for _ in range(5)]
    for weight in weights:
        products.linear(torch.randn(9, 600), weight, None)
    assert len(products._packed) == 3


def test_models_in_other_dtypes_keep_the_products_of_torch():
    assert frozen_products(torch.empty(1, dtype=torch.bfloat16)) is None
    assert frozen_products(torch.empty(1, dtype=torch.float64)) is None
