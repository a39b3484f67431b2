"""A xorl model of one tenant is, for every call of another one, as if it did not exist; names are everybody's own."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from tests.support.cards import MODEL_NAME
from tests.support.rig import FAST, running_rig
from tests.support.xorl import Xorl

from gradstream.shared.ids import LOCAL_TENANT, TenantId
from gradstream.shared.keys import change_keys, mint

INPUT = {
    "data": [{"model_input": {"input_ids": [1, 2, 3]}, "loss_fn_inputs": {"labels": [1, 2, 3]}}],
    "loss_fn": "cross_entropy",
}


@dataclass(frozen=True, slots=True)
class House:
    alice: Xorl
    bob: Xorl
    local: Xorl


@pytest.fixture
def house(redis_url: str, engine_name: str, tmp_path: Path) -> Iterator[House]:
    path = tmp_path / "keys.json"

    def key(tenant: str) -> str:
        made = mint(TenantId(tenant), created_ms=0)
        change_keys(path, lambda keys: (*keys, made.stored))
        return made.text

    keys = [key(tenant) for tenant in ("alice", "bob", LOCAL_TENANT)]
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(running_rig(redis_url, engine=engine_name, config=replace(FAST, keys_file=path)))
        clients = [
            stack.enter_context(httpx.Client(base_url=rig.base_url, timeout=60, headers={"X-API-Key": text}))
            for text in keys
        ]
        yield House(*(Xorl(replace(rig, http=client)) for client in clients))


def test_each_tenant_has_its_own_model_of_a_name(house: House) -> None:
    for who, rank in ((house.alice, 4), (house.bob, 8), (house.local, 16)):
        who.done("create_model", model_id="mine", base_model=MODEL_NAME, lora_config={"rank": rank})
        who.done("forward_backward", model_id="mine", forward_backward_input=INPUT)
    assert [who.ok("get_info", model_id="mine")["lora_rank"] for who in (house.alice, house.bob, house.local)] == [
        4,
        8,
        16,
    ]
    owners = {owner for owner, _, _ in house.alice.rig.worker.seen}
    assert owners == {"alice:mine", "bob:mine", "mine"}


def test_each_tenant_has_its_own_default(house: House) -> None:
    for who in (house.alice, house.bob, house.local):
        assert "error" not in who.outcome(who.post("optim_step", model_id="default"))
    seen = [owner for owner, _, op in house.alice.rig.worker.seen if op == "create_model"]
    assert sorted(seen) == ["alice:default", "bob:default", "default"]


CALLS = {
    "optim_step": {"model_id": "hers"},
    "forward_backward": {"model_id": "hers", "forward_backward_input": INPUT},
    "forward": {"model_id": "hers", "forward_input": INPUT},
    "unload_model": {"model_id": "hers"},
    "get_info": {"model_id": "hers"},
    "retrieve_future": {"request_id": "alice:hers:0"},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_stranger_sees_what_he_sees_of_nothing(house: House, call: str) -> None:
    house.alice.make("hers")
    asked = CALLS[call]
    theirs = house.bob.post(call, **asked)
    nothing = house.bob.post(
        call,
        **{
            name: str(value).replace("hers", "none") if value in ("hers", "alice:hers:0") else value
            for name, value in asked.items()
        },
    )
    assert theirs.status_code == nothing.status_code == 404
    assert theirs.json()["detail"].replace("hers", "none") == nothing.json()["detail"]
    house.alice.step("hers")


def test_a_strangers_question_does_not_make_a_repeated_request_a_new_job(house: House) -> None:
    house.alice.make("hers")
    body = {"model_id": "hers", "seq_id": 1, "forward_backward_input": INPUT}
    first = house.alice.ok("forward_backward", **body)
    assert house.bob.post("retrieve_future", request_id=first["request_id"]).status_code == 404
    assert house.alice.ok("forward_backward", **body) == first


def test_a_call_without_a_key_is_refused_before_its_body_is_read(house: House) -> None:
    for path in ("/api/v1/forward_backward", "/xorl/api/v1/forward_backward", "/xorl/sleep", "/sleep"):
        assert httpx.post(f"{house.alice.rig.base_url}{path}", content=b"{}", timeout=60).status_code == 401
