"""What the pass at start finds, and that it leaves nothing behind."""

import pytest
import torch
from tests.support.engine_builders import DENSE, MOE, open_engine
from tests.support.switches import KINDS

from gradstream.engine import engine as engine_module
from gradstream.engine.engine import Engine
from gradstream.engine.self_test import self_test
from gradstream.shared.errors import Unsupported

pytestmark = pytest.mark.config_field("enable_self_test")


def opened(kind: str, path=DENSE, **changes: object) -> Engine:
    return open_engine(path, is_lora=kind == "adapters", **changes)


def failure(engine: Engine) -> str:
    with pytest.raises(Unsupported) as caught:
        self_test(engine.state)
    return caught.value.message


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_model_passes_and_is_as_before(kind, path):
    engine = opened(kind, path, enable_self_test=True)
    plain = opened(kind, path)
    assert not engine.state.models
    got, want = (dict(one.state.base.causal_lm.named_parameters()) for one in (engine, plain))
    assert all(torch.equal(got[name], want[name]) and got[name].grad is None for name in want)


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_at_start_where_it_is_wanted(kind, monkeypatch):
    tested = []
    monkeypatch.setattr(engine_module, "self_test", tested.append)
    engine = opened(kind, enable_self_test=True)
    opened(kind)
    assert tested == [engine.state]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_give_nan_are_found(kind):
    engine = opened(kind)
    with torch.no_grad():
        engine.state.base.causal_lm.get_parameter("model.norm.weight")[3] = torch.nan
    assert failure(engine).startswith("enable_self_test: losses or gradients of random tokens hold nan or inf; ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_gives_other_numbers_each_time_is_found(kind):
    engine = opened(kind)
    norm = engine.state.base.causal_lm.get_submodule("model.norm")
    generator = torch.Generator().manual_seed(0)
    norm.register_forward_hook(lambda _module, _args, out: out * (1 + 1e-4 * torch.rand(1, generator=generator)))
    assert failure(engine).startswith("enable_self_test: the same tokens gave other numbers the second time")


def test_a_pass_that_changes_weights_is_found():
    engine = opened("adapters")
    norm = engine.state.base.causal_lm.get_submodule("model.norm")
    first = engine.state.base.causal_lm.get_parameter("model.layers.0.self_attn.q_proj.weight")
    calls = []

    def change(*_: object) -> None:
        calls.append(None)
        if len(calls) == 2:
            first.add_(1e-3)

    norm.register_forward_hook(change)
    assert "changed the weights" in failure(engine)


def test_a_gradient_of_zero_is_found():
    engine = opened("full weights")
    norm = engine.state.base.causal_lm.get_submodule("model.norm")
    norm.register_forward_hook(lambda _module, _args, out: out.detach() * 0)
    engine.state.base.head_weight = torch.zeros_like(engine.state.base.head_weight)
    assert "gradient of random tokens is zero" in failure(engine)


def test_a_pass_that_fails_is_told_with_its_reason():
    engine = opened("adapters")
    engine.state.base.causal_lm.get_submodule("model.norm").weight = torch.nn.Parameter(torch.ones(3))
    message = failure(engine)
    assert message.startswith("enable_self_test: a training pass of 15 tokens failed: ")
    assert "\n" not in message
