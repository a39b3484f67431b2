"""What a model is made as, by every way of asking, and what another request of it differs in."""

import msgspec
import pytest

from gradstream.api.xorl.creation import CreateBody, differences, spec_of, tokenizer_name
from gradstream.api.xorl.specs import ModelSpec, StepDefaults, default_spec
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import LoraSpec, OptimizerSpec


def spec(card: EngineCard, **fields: object) -> ModelSpec:
    return spec_of(CreateBody.model_validate(fields), card)


def refusal(card: EngineCard, **fields: object) -> str:
    with pytest.raises(InvalidRequest) as error:
        spec(card, **fields)
    return error.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_config": {"rank": 8, "alpha": 12}},
        {"lora_config": {"lora_rank": 8, "lora_alpha": 12.0, "dropout": 0.0}},
        {"lora_config": {"alpha": 12, "target_modules": ["all-linear"]}, "lora_rank": 8},
        {"lora_config": {"rank": 8}, "lora_rank": 8, "lora_alpha": 12},
    ],
)
def test_rank_and_alpha_come_in_every_spelling(card, fields):
    assert spec(card, **fields).lora == LoraSpec(rank=8, alpha=12.0)


def test_the_server_says_what_a_client_leaves_out(card):
    assert spec(card).lora == LoraSpec(rank=32, alpha=16.0)
    assert spec(card).optimizer == card.optimizer
    assert spec(card).base_model == card.model_name


def test_modules_are_kept_in_one_order(card):
    found = spec(card, lora_config={"rank": 8, "target_modules": ["v_proj", "q_proj", "v_proj"]})
    assert found.lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.config_field("lora_target_modules")
def test_the_servers_modules_are_those_of_clients_that_name_none(card):
    own = msgspec.structs.replace(card, default_modules=["v_proj", "q_proj"])
    assert spec(own).lora.target_modules == default_spec(own).lora.target_modules == ["q_proj", "v_proj"]
    assert spec(own, lora_config={"target_modules": ["o_proj"]}).lora.target_modules == ["o_proj"]
    assert spec(own, lora_config={"target_modules": ["all-linear"]}).lora.target_modules == ["all-linear"]


def test_a_server_of_full_weights_reads_no_lora_config(card):
    full = msgspec.structs.replace(card, is_lora=False)
    assert spec(full, lora_config={"rank": 32}).lora is None
    assert spec(full, lora_config={"rank": 8}) == spec(full)


def test_an_optimizer_is_completed_by_the_servers_and_one_of_another_type_by_the_dtype_alone(card):
    own = msgspec.structs.replace(card, optimizer=OptimizerSpec(type="adamw", dtype="bf16", kahan=False))
    assert spec(own, optimizer_config={"learning_rate": 1e-3}).optimizer == own.optimizer
    config = {"type": "adamw", "optimizer_dtype": "fp32"}
    assert spec(own, optimizer_config=config).optimizer == OptimizerSpec(kahan=False)
    assert spec(own, optimizer_config={"type": "sgd"}).optimizer == OptimizerSpec(type="sgd", dtype="bf16")
    config = {"type": "sgd", "optimizer_dtype": "fp32"}
    assert spec(own, optimizer_config=config).optimizer == OptimizerSpec(type="sgd")


def test_optimizer_kwargs_are_the_types_own_fields(card):
    kwargs = {"muon_momentum": 0.9, "muon_ns_steps": 3}
    config = {"type": "muon", "learning_rate": 1e-3, "optimizer_kwargs": kwargs}
    found = spec(card, optimizer_config=config).optimizer
    assert found == OptimizerSpec(type="muon", learning_rate=1e-3, muon_momentum=0.9, muon_ns_steps=3)


def test_what_steps_take_is_remembered(card):
    config = {"learning_rate": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1}
    want = StepDefaults(learning_rate=1e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
    found = spec(card, optimizer_config=config)
    assert found.step_defaults == want
    assert msgspec.json.decode(found.record()["step_defaults"], type=StepDefaults) == want
    assert msgspec.json.decode(found.record()["spec"], type=ModelSpec) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_config": {"rank": 65}}, "lora_config.rank: 65 is more than 64, the largest rank here"),
        ({"lora_config": {"rank": 8, "dropout": 0.1}}, "lora_config.dropout"),
        ({"lora_config": {"rank": 8, "lora_rank": 9}}, "lora_config.rank: given as 8 and as 9"),
        (
            {"optimizer_config": {"type": "signsgd"}},
            "optimizer_config.type: 'signsgd' is not offered here; choose one of adamw,",
        ),
        ({"optimizer_config": {"optimizer_kwargs": {"rho": 1}}}, "optimizer_kwargs: there is no rho; there are"),
        ({"optimizer_config": {"optimizer_kwargs": {"type": "sgd"}}}, "optimizer_kwargs: there is no type"),
        ({"optimizer_config": {"optimizer_kwargs": {"kahan": "yes"}}}, "optimizer_config: Expected `bool`"),
    ],
)
def test_what_cannot_be_made_is_refused_by_its_field(card, fields, message):
    assert message in refusal(card, **fields)


def test_two_creations_differ_by_name_in_what_they_do_not_agree_on(card):
    first = spec(card, lora_config={"rank": 8}, optimizer_config={"learning_rate": 1e-3})
    second = spec(card, lora_config={"rank": 16}, optimizer_config={"type": "sgd"})
    assert differences(first, second) == [
        "lora.rank was 8, now 16",
        "optimizer.type was adamw, now sgd",
        "optimizer_config.learning_rate was 0.001, now None",
    ]
    assert differences(first, first) == []
    assert differences(first, msgspec.structs.replace(first, base_model="alias")) == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lora_config": {"rank": 1, "alpha": 1e39}}, "lora_config.alpha"),
        ({"optimizer_config": {"learning_rate": 1e39}}, "optimizer_config.learning_rate"),
        ({"optimizer_config": {"eps": 1e39}}, "optimizer_config.eps"),
        ({"optimizer_config": {"weight_decay": 1e39}}, "optimizer_config.weight_decay"),
        ({"optimizer_config": {"type": "muon", "optimizer_kwargs": {"muon_lr": 1e39}}}, "optimizer_config.muon_lr"),
    ],
)
def test_a_number_beyond_float32_is_refused_by_name(card, fields, field):
    assert f"{field}: 1e+39 is beyond float32" in refusal(card, **fields)


def test_the_tokenizers_name_is_no_path_of_the_machine(card):
    assert tokenizer_name(card, "tests/uniform") == "models/uniform"
    unnamed = msgspec.structs.replace(card, tokenizer_id="/models/some/where")
    assert tokenizer_name(unnamed, "tests/uniform") == "tests/uniform"
