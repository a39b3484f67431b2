"""merge_qkv: one product in the place of three, the same numbers, the same names."""

import numpy as np
import pytest
import torch
from tests.support.engine_builders import DENSE, MOE
from tests.support.oracle import relative_error
from tests.support.switches import KINDS, Ops, base_of, driver_of, hidden_of, pass_of

from gradstream.engine.models.merged_qkv import SharedProduct

pytestmark = pytest.mark.config_field("merge_qkv")


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_product_gives_the_same_log_probabilities_to_the_bit_and_the_same_gradient(kind, path):
    merged, apart = (pass_of(driver_of(kind, path, merge_qkv=merge)) for merge in (True, False))
    np.testing.assert_array_equal(merged[0], apart[0])
    assert relative_error(merged[1], apart[1]) < 1e-6


def test_three_products_of_each_layer_become_one():
    counts = {}
    for merge in (True, False):
        base = base_of(merge_qkv=merge)
        with Ops() as ops:
            hidden_of(base)
        counts[merge] = ops.num_products
    assert counts[False] - counts[True] == 2 * base.num_layers


def test_the_frozen_projections_keep_their_names_and_values_and_share_memory():
    merged, apart = base_of(merge_qkv=True), base_of(merge_qkv=False)
    want = dict(apart.causal_lm.named_parameters())
    got = dict(merged.causal_lm.named_parameters())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    q, k, v = (got[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    assert k.data_ptr() == q.data_ptr() + q.nbytes
    assert v.data_ptr() == k.data_ptr() + k.nbytes


def test_the_flat_layout_of_full_weights_names_the_three():
    merged, apart = (driver_of("full weights", merge_qkv=merge).engine.state.flat.layout for merge in (True, False))
    assert merged.digest == apart.digest
    assert any(tensor.name.endswith("layers.0.self_attn.k_proj.weight") for tensor in merged.tensors)


def test_blocks_of_a_shared_product_never_belong_to_another_input():
    runs = []
    product = SharedProduct(lambda x: (runs.append(x), torch.cat([x, 2 * x], dim=-1))[1], [1, 1])
    one, other = torch.ones(1, 1), torch.full((1, 1), 5.0)
    assert product.take(0, one) == 1
    assert product.take(0, other) == 5
    assert product.take(1, one) == 2
    assert product.take(0, one) == 1
    assert product.take(0, one) == 1
    assert len(runs) == 4


def test_a_product_that_fails_leaves_no_input_and_no_block_behind():
    one, bad = torch.ones(1, 1), torch.full((1, 1), -1.0)

    def run(x):
        if x is bad:
            raise RuntimeError("no room")
        return torch.cat([x, 2 * x], dim=-1)

    product = SharedProduct(run, [1, 1])
    assert product.take(0, one) == 1
    for place in (0, 1):
        with pytest.raises(RuntimeError, match="no room"):
            product.take(place, bad)
    assert product._x is None
    assert product._blocks == [None, None]
    assert product.take(1, one) == 2
