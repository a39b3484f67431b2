"""What a tinker client's create_model becomes on servers of other kinds."""

import msgspec
import pytest
from tests.support.cards import UNIFORM_CARD

from gradstream.api.tinker.models import LoraBody, OptimizerBody, _lora_spec, _optimizer_spec
from gradstream.shared.errors import Unsupported
from gradstream.shared.wire import LoraSpec, OptimizerSpec


def test_a_client_that_names_adamw_gets_it_on_a_server_whose_own_optimizer_is_muon():
    muon = msgspec.structs.replace(UNIFORM_CARD, optimizer=OptimizerSpec(type="muon", dtype="bf16"))
    assert _optimizer_spec(OptimizerBody(type="adamw"), muon) == OptimizerSpec(type="adamw", dtype="bf16")
    assert _optimizer_spec(None, muon) is None


def test_a_client_that_names_the_servers_own_optimizer_gets_that():
    own = msgspec.structs.replace(UNIFORM_CARD, optimizer=OptimizerSpec(dtype="bf16"))
    assert _optimizer_spec(OptimizerBody(type="adamw"), own) is None


def test_a_server_of_full_weights_makes_no_adapter():
    full = msgspec.structs.replace(UNIFORM_CARD, is_lora=False)
    with pytest.raises(Unsupported, match="enable_lora: true"):
        _lora_spec(LoraBody(rank=8), full)
    assert _lora_spec(LoraBody(rank=8), UNIFORM_CARD) == LoraSpec(rank=8)
