"""rmsnorm_native, activation_native, rope_native and attention_cast_bf16: which functions run, and what they compute."""

import pytest
import torch
from tests.support.engine_builders import DENSE, MOE
from tests.support.oracle import relative_error
from tests.support.switches import KINDS, Ops, base_of, driver_of, hidden_of, pass_of
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from gradstream.engine.attention.segments import Segments
from gradstream.engine.models import switches
from gradstream.engine.models.fused import FusedRMSNorm, fuse_gates, fuse_norms, fuse_rotary, rotate, silu_gate
from gradstream.shared.errors import Unsupported

HALF = torch.bfloat16


def transformers_model(path=DENSE, dtype=torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Calls:
    """A function that counts its calls."""

    def __init__(self, function) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        return self.function(*args)


@pytest.mark.config_field("rmsnorm_native")
def test_fused_norms_are_torchs_own_and_every_norm_of_the_model():
    fused, native = base_of(rmsnorm_native=False), base_of(rmsnorm_native=True)
    # Two of each layer, those of q and k, and the last one.
    assert sum(isinstance(module, FusedRMSNorm) for module in fused.causal_lm.modules()) == 4 * fused.num_layers + 1
    assert not any(isinstance(module, FusedRMSNorm) for module in native.causal_lm.modules())
    assert dict(fused.causal_lm.named_parameters()).keys() == dict(native.causal_lm.named_parameters()).keys()
    torch.testing.assert_close(hidden_of(fused), hidden_of(native), rtol=1e-5, atol=1e-5)


@pytest.mark.config_field("rmsnorm_native")
def test_a_fused_norm_rounds_once_where_the_native_one_rounds_twice():
    x, weight = random(64, 48, dtype=HALF), random(48, seed=1, dtype=HALF)
    norm = FusedRMSNorm(nn.Parameter(weight), 1e-6)
    exact = rms_norm(x.double(), (48,), weight.double(), 1e-6)
    assert torch.equal(norm(x), exact.to(HALF))
    native = weight * rms_norm(x.float(), (48,), None, 1e-6).to(HALF)
    assert not torch.equal(native, exact.to(HALF))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.config_field("rmsnorm_native")
def test_training_through_fused_norms_gives_the_same_gradient(kind):
    fused, native = (pass_of(driver_of(kind, rmsnorm_native=value))[1] for value in (False, True))
    assert relative_error(fused, native) < 1e-4


@pytest.mark.config_field("activation_native")
@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
@torch.no_grad()
def test_a_fused_gate_takes_the_place_of_every_gate(path):
    model = transformers_model(path)
    model.config._experts_implementation = "grouped_mm"
    tokens = torch.arange(7)[None]
    want = model(input_ids=tokens).logits
    gate = Calls(silu_gate)
    assert fuse_gates(model, gate) == len(model.model.layers)
    torch.testing.assert_close(model(input_ids=tokens).logits, want, rtol=1e-4, atol=1e-4)
    assert gate.count == len(model.model.layers)


def test_a_fused_gate_and_a_fused_rotary_embedding_round_once():
    gate, up = random(9, 16, dtype=HALF), random(9, 16, seed=1, dtype=HALF)
    assert torch.equal(silu_gate(gate, up), (silu(gate.double()) * up.double()).to(HALF))
    q, k = random(1, 4, 9, 8, dtype=HALF), random(1, 2, 9, 8, seed=1, dtype=HALF)
    angles = random(1, 9, 4, seed=2)
    cos, sin = (torch.cat((part, part), dim=-1).to(HALF) for part in (angles.cos(), angles.sin()))
    exact = apply_rotary_pos_emb(*(x.double() for x in (q, k, cos, sin)))
    for got, want in zip(rotate(q, k, cos, sin), exact, strict=True):
        assert torch.equal(got, want.to(HALF))


@pytest.mark.config_field("rope_native")
@torch.no_grad()
def test_a_fused_rotary_embedding_takes_the_place_of_one_models_and_no_others():
    model, other = transformers_model(), transformers_model()
    tokens = torch.arange(7)[None]
    want = model(input_ids=tokens).logits
    rotary = Calls(rotate)
    assert fuse_rotary(model, rotary) == len(model.model.layers)
    torch.testing.assert_close(model(input_ids=tokens).logits, want, rtol=1e-4, atol=1e-4)
    assert rotary.count == len(model.model.layers)
    other(input_ids=tokens)
    assert rotary.count == len(model.model.layers)


class Recorder:
    """Attention that keeps the queries and keys of the first layer."""

    def __init__(self, base, num_tokens: int) -> None:
        self.packed = base.packed([num_tokens])
        self.segments: Segments = self.packed.segments
        self.seen = None

    def attend(self, layer, q_HTK, k_GTK, v_GTK, *, scaling):
        self.seen = self.seen or (q_HTK, k_GTK, v_GTK)
        return self.packed.attend(layer, q_HTK, k_GTK, v_GTK, scaling=scaling)


@pytest.mark.config_field("attention_cast_bf16")
@torch.no_grad()
def test_queries_and_keys_are_rounded_to_bfloat16_after_the_rotary_embedding_and_values_are_not():
    seen = {}
    for cast in (True, False):
        base = base_of(attention_cast_bf16=cast)
        record = Recorder(base, 12)
        base.hidden(torch.arange(12), record.segments.positions, attention=record, adapters=None)
        seen[cast] = record.seen
    for got, want in zip(seen[True][:2], seen[False][:2], strict=True):
        assert got.dtype is torch.float32
        assert torch.equal(got, want.to(HALF).float())
        assert not torch.equal(got, want)
    assert torch.equal(seen[True][2], seen[False][2])


def test_a_model_without_anything_to_fuse_is_refused_by_the_field():
    model = nn.Module()
    model.lm_head = nn.Linear(4, 4)
    for field, function in (("rmsnorm_native", fuse_norms), ("rope_native", fuse_rotary)):
        assert function(model) == 0
        with pytest.raises(Unsupported, match=rf"^{field}: Module has no .* use true$"):
            switches.exchange_functions(model, switches.Numerics(**{field: False}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.config_field("moe_implementation")
def test_native_experts_are_one_grouped_product_with_the_same_numbers(kind):
    results, counts = {}, {}
    for moe in ("eager", "native", None):
        driver = driver_of(kind, MOE, moe_implementation=moe)
        with Ops() as ops:
            results[moe] = pass_of(driver)
        counts[moe] = ops.counts["_grouped_mm"]
    assert counts["eager"] == counts[None] == 0
    # Two products forward and two back for each layer; trained weights take one more of each.
    assert counts["native"] == (4 if kind == "adapters" else 6) * driver.engine.state.base.num_layers
    assert abs(results["native"][0] - results["eager"][0]).max() < 1e-5
    assert relative_error(results["native"][1], results["eager"][1]) < 1e-5
