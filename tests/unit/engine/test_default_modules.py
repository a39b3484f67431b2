"""lora_target_modules: what adapters change whose client names no modules."""

import msgspec
import pytest
from tests.support.engine_builders import DENSE, MOE, Driver, create, open_engine

from gradstream.engine.adapters.adapter import Adapter
from gradstream.shared.errors import Unsupported
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import CreateModel, Failed, LoraSpec

pytestmark = pytest.mark.config_field("lora_target_modules")


def modules(driver: Driver, model: str = "m") -> list[str]:
    adapter = driver.engine.state.models[ModelId(model)]
    assert isinstance(adapter, Adapter)
    return sorted({site.name.rpartition(".")[2] for site in adapter.layout.sites})


def named(*names: str, **switches: bool) -> CreateModel:
    lora = LoraSpec(rank=2, target_modules=list(names) or None, **switches)
    return msgspec.structs.replace(create(), lora=lora)


def driver_of(*names: str, path=DENSE) -> Driver:
    return Driver(open_engine(path, lora_target_modules=names))


def test_an_adapter_whose_client_names_none_gets_the_servers():
    driver = driver_of("q_proj", "v_proj", "down_proj")
    driver.done("m", named())
    assert modules(driver) == ["down_proj", "q_proj", "v_proj"]


def test_a_clients_own_modules_are_taken_as_they_are():
    driver = driver_of("q_proj")
    driver.done("m", named("o_proj"))
    assert modules(driver) == ["o_proj"]
    driver.done("all", named("all-linear"))
    assert len(modules(driver, "all")) == 8


def test_switches_choose_among_the_servers_modules():
    driver = driver_of("q_proj", "down_proj")
    driver.done("m", named(train_mlp=False))
    assert modules(driver) == ["q_proj"]
    (outcome,) = driver.run(("none", named(train_attn=False, train_mlp=False)))
    assert isinstance(outcome, Failed)
    assert "leave none of q_proj, down_proj, which this server's adapters change" in outcome.message


def test_gate_and_up_mean_the_fused_weight_of_experts():
    driver = driver_of("gate_proj", "up_proj", "q_proj", path=MOE)
    driver.done("m", named())
    assert modules(driver) == ["gate_up_proj", "q_proj"]


def test_the_spec_keeps_what_was_chosen():
    driver = driver_of("q_proj")
    driver.done("m", named())
    adapter = driver.engine.state.models[ModelId("m")]
    assert isinstance(adapter, Adapter)
    assert adapter.spec.target_modules == ["q_proj"]


@pytest.mark.parametrize(("names", "found"), [(("q_proj", "qkv"), "qkv"), ((), "an empty list")])
def test_modules_that_the_model_does_not_have_are_refused_at_start(names, found):
    with pytest.raises(Unsupported, match=rf"^lora_target_modules: {found}; modules of Qwen3ForCausalLM .* lm_head"):
        driver_of(*names)


def test_the_card_and_the_fingerprint_tell_of_them():
    card = driver_of("q_proj", "k_proj").engine.card(epoch=1)
    assert card.default_modules == ["q_proj", "k_proj"]
    assert " modules=q_proj,k_proj" in card.fingerprint
    assert " modules=" not in open_engine().card(epoch=1).fingerprint
