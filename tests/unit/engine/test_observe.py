"""What is logged of gradients and routers: right numbers, only at DEBUG, and without a changed bit."""

import logging
from collections.abc import Iterator
from math import log

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from structlog.typing import EventDict
from tests.support.engine_builders import DENSE, MOE, Driver, cross_entropy, open_engine, random_data, randomize
from tests.support.full import MODEL, Twin, full_driver

from gradstream.engine.config import Memory
from gradstream.engine.observe import describe_loads, kind_of

LOGGER = "gradstream.engine.observe"
DATA = random_data([20, 9])


@pytest.fixture
def debug() -> Iterator[None]:
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(before)


def events_of(driver: Driver, *, backward: bool = True) -> list[EventDict]:
    with capture_logs() as events:
        driver.done(MODEL, cross_entropy(DATA, backward=backward))
    return events


def adapter(path=DENSE, **changes: object) -> Driver:
    driver = Driver(open_engine(path, **changes))
    driver.create(MODEL)
    randomize(driver, MODEL)
    return driver


@pytest.mark.usefixtures("debug")
@pytest.mark.config_field("log_gradient_norms")
class TestGradientNorms:
    @pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
    def test_of_full_weights_are_those_of_autograd(self, path):
        (event,) = events_of(full_driver(path, log_gradient_norms=True, freeze_router=False))
        twin = Twin(path, freeze_router=False)
        twin.loss(DATA).backward()
        squares: dict[str, float] = {}
        for name, parameter in twin.trained().items():
            squares[kind_of(name)] = squares.get(kind_of(name), 0.0) + float(parameter.grad.square().sum())
        assert event["event"] == "gradient_norms"
        assert event["log_level"] == "debug"
        assert event["model_id"] == MODEL
        assert event["norms"] == pytest.approx({kind: square**0.5 for kind, square in squares.items()}, rel=1e-4)
        assert event["total"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-4)

    def test_of_an_adapter_have_one_number_for_each_kind_of_module(self):
        driver = adapter(log_gradient_norms=True)
        (event,) = events_of(driver)
        kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
        assert event["norms"].keys() == kinds
        assert event["total"] == pytest.approx(float(driver.grad(MODEL).double().norm()))

    def test_are_of_the_jobs_own_gradient(self):
        driver = adapter(log_gradient_norms=True)
        first, second = events_of(driver), events_of(driver)
        assert first == second

    def test_are_of_the_jobs_own_gradient_where_it_is_added_in_place(self):
        driver = full_driver(log_gradient_norms=True)
        (first,), (second,) = events_of(driver), events_of(driver)
        assert second["norms"] == pytest.approx(first["norms"], rel=1e-4)

    def test_are_not_logged_of_a_forward_or_where_they_are_not_wanted(self):
        assert events_of(adapter(log_gradient_norms=True), backward=False) == []
        assert events_of(adapter()) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embed"),
        ("model.norm.weight", "norm"),
        ("model.layers.3.post_attention_layernorm.weight", "norm"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.layers.3.self_attn.q_proj.bias", "q_proj"),
        ("model.layers.3.self_attn.q_proj.a", "q_proj"),
        ("model.layers.3.mlp.gate_proj.weight", "gate_proj"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.experts.gate_up_proj", "gate_up_proj"),
        ("lm_head.b", "lm_head"),
    ],
)
def test_a_parameter_is_of_the_kind_of_its_module(name, kind):
    assert kind_of(name) == kind


@pytest.mark.usefixtures("debug")
@pytest.mark.config_field("log_router_stats")
class TestRouterLoads:
    @pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
    @pytest.mark.parametrize("kind", ["adapters", "full weights"])
    def test_every_choice_is_counted_once(self, kind, is_recomputed):
        memory = Memory(enable_gradient_checkpointing=is_recomputed)
        make = full_driver if kind == "full weights" else adapter
        driver = make(MOE, log_router_stats=True, memory=memory)
        (event,) = events_of(driver)
        config = driver.engine.state.base.causal_lm.config
        assert event["event"] == "router_loads"
        assert event["choices"] == 29 * config.num_experts_per_tok * config.num_hidden_layers
        assert len(event["fractions"]) == config.num_experts
        assert sum(event["fractions"]) == pytest.approx(1, abs=1e-3)
        assert len(event["entropy"]) == len(event["max_load"]) == config.num_hidden_layers

    def test_loads_are_those_of_transformers(self):
        (event,) = events_of(full_driver(MOE, log_router_stats=True))
        twin = Twin(MOE)
        num_chosen, num_experts = twin.model.config.num_experts_per_tok, twin.model.config.num_experts
        counts = [torch.zeros(num_experts, dtype=torch.int64) for _ in range(twin.model.config.num_hidden_layers)]
        for tokens in DATA.tokens:
            output = twin.model(input_ids=torch.tensor(tokens).long()[None], output_router_logits=True)
            for own, logits in zip(counts, output.router_logits, strict=True):
                own.add_(torch.bincount(logits.topk(num_chosen).indices.flatten(), minlength=num_experts))
        want = describe_loads({str(layer): own for layer, own in enumerate(counts)})
        assert {name: event[name] for name in want} == want

    def test_a_model_without_experts_has_none(self):
        assert events_of(adapter(DENSE, log_router_stats=True)) == []

    def test_are_not_logged_where_they_are_not_wanted(self):
        assert events_of(adapter(MOE)) == []


def test_even_and_uneven_loads_are_told_apart():
    told = describe_loads({"a": torch.tensor([5, 5, 5, 5]), "b": torch.tensor([20, 0, 0, 0])})
    assert told["entropy"] == pytest.approx([log(4), 0.0], abs=1e-4)
    assert told["max_load"] == [1.0, 4.0]
    assert told["fractions"] == [0.625, 0.125, 0.125, 0.125]
    assert told["choices"] == 40


def test_below_debug_nothing_is_computed(monkeypatch):
    driver = adapter(MOE, log_gradient_norms=True, log_router_stats=True)
    monkeypatch.setattr(torch, "bincount", lambda *_, **__: pytest.fail("counted"))
    assert events_of(driver) == []


def test_logs_change_no_bit(debug):
    del debug
    grads = []
    for is_logged in (False, True):
        driver = adapter(MOE, log_gradient_norms=is_logged, log_router_stats=is_logged)
        assert bool(events_of(driver)) is is_logged
        grads.append(driver.grad(MODEL).numpy())
    np.testing.assert_array_equal(*grads)
