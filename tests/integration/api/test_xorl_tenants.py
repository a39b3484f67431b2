"""What one tenant calls `policy` is nothing to another one: for each call it is exactly as if nobody had it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from tests.support.rig import FAST, Rig, running_rig
from tests.support.xorl import Xorl

from gradstream.shared.ids import TenantId
from gradstream.shared.keys import change_keys, mint

MINE, NOBODYS = "policy", "nobody"


@dataclass(frozen=True, slots=True)
class House:
    """One server and two tenants, of whom the first has the model MINE with checkpoints, a finished future and a pending one."""

    alice: Xorl
    bob: Xorl
    future: str


@pytest.fixture
def house(redis_url: str, engine_name: str, tmp_path: Path) -> Iterator[House]:
    path = tmp_path / "keys.json"
    with contextlib.ExitStack() as stack:
        made = [mint(TenantId(name), created_ms=0) for name in ("alice", "bob")]
        change_keys(path, lambda keys: (*keys, *(one.stored for one in made)))
        rig = stack.enter_context(running_rig(redis_url, engine=engine_name, config=replace(FAST, keys_file=path)))
        alice, bob = (stack.enter_context(client_of(rig, one.text)) for one in made)
        alice.make(MINE)
        alice.done("save_weights", model_id=MINE, path="one")
        alice.done("save_weights_for_sampler", model_id=MINE, name="one")
        future = alice.ok("optim_step", model_id=MINE, adam_params={"learning_rate": 1e-4})["request_id"]
        yield House(alice=alice, bob=bob, future=future)


@contextlib.contextmanager
def client_of(rig: Rig, key: str) -> Iterator[Xorl]:
    with httpx.Client(base_url=rig.base_url, timeout=30, headers={"Authorization": f"Bearer {key}"}) as http:
        yield Xorl(replace(rig, http=http))


Call = Callable[[Xorl, str], httpx.Response]
_TENSOR = {"data": [1, 2, 3], "dtype": "int64", "shape": [3]}
_DATA = {"data": [{"model_input": {"input_ids": [1, 2, 3]}, "loss_fn_inputs": {"labels": _TENSOR}}]}


def about(call: str, **fields: object) -> Call:
    return lambda xorl, model: xorl.post(call, model_id=model, **fields)


# Every call that names a model or something of one's, by route; the names say in which way.
CALLS: dict[str, Call] = {
    "forward_backward": about("forward_backward", forward_backward_input={**_DATA, "loss_fn": "cross_entropy"}),
    "forward": about("forward", forward_input={**_DATA, "loss_fn": "cross_entropy"}),
    "optim_step": about("optim_step", adam_params={"learning_rate": 1e-4}),
    "get_info": about("get_info"),
    "unload_model": about("unload_model"),
    "save_weights": about("save_weights", path="x"),
    "save_weights_for_sampler": about("save_weights_for_sampler", name="x"),
    "load_weights": about("load_weights", path="one"),
    "list_checkpoints": about("list_checkpoints"),
    "delete_checkpoint": about("delete_checkpoint", checkpoint_id="weights/one"),
    "delete_checkpoint, by URI": lambda xorl, model: xorl.post(
        "delete_checkpoint", checkpoint_id=f"xorl://{model}/weights/one"
    ),
    "delete_checkpoint, by the owner's id": lambda xorl, model: xorl.post(
        "delete_checkpoint", checkpoint_id=f"weights/alice:{model}/one"
    ),
    "weights_info": lambda xorl, model: xorl.post("weights_info", xorl_path=f"xorl://{model}/weights/one"),
    "weights_info, by the owner's id": lambda xorl, model: xorl.post(
        "weights_info", xorl_path=f"xorl://alice:{model}/weights/one"
    ),
    "kill_session": about("kill_session"),
    "session_heartbeat": lambda xorl, model: xorl.post("session_heartbeat", session_id=model),
    "retrieve_future": lambda xorl, model: xorl.post("retrieve_future", request_id=f"alice:{model}:1"),
    "training_runs/{run_id}": lambda xorl, model: xorl.rig.http.get(f"/api/v1/training_runs/{model}"),
}
# Calls that name nothing of anybody's: making something, or about machines and the server itself.
NAMELESS = {
    *("create_model", "create_session", "session_info", "create_sampling_session", "sync_inference_weights"),
    *("/health", "/sleep", "/wake_up", "/sync_inference_weights"),
    *("/add_inference_endpoint", "/remove_inference_endpoint", "/list_inference_endpoints"),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_tenants_thing_is_answered_like_one_that_never_was(house: House, name: str) -> None:
    foreign, unknown = (CALLS[name](house.bob, model) for model in (MINE, NOBODYS))
    assert foreign.status_code == unknown.status_code == 404, foreign.text
    assert foreign.text.replace(MINE, NOBODYS) == unknown.text
    assert foreign.elapsed.total_seconds() < FAST.poll_hold_s


def test_nothing_that_another_tenant_tried_has_changed_anything(house: House) -> None:
    for call in CALLS.values():
        call(house.bob, MINE)
    checkpoints = house.alice.ok("list_checkpoints", model_id=MINE)["checkpoints"]
    assert {one["checkpoint_id"] for one in checkpoints} == {"weights/one", "sampler_weights/one"}
    assert "metrics" in house.alice.ok("retrieve_future", request_id=house.future)
    house.alice.step(MINE)
    assert all(owner.startswith("alice:") for owner, _, _ in house.alice.rig.worker.seen)


def test_two_tenants_have_models_of_one_name_each(house: House) -> None:
    house.bob.make(MINE)
    house.bob.done("save_weights", model_id=MINE, path="two")
    listed = house.bob.ok("list_checkpoints", model_id=MINE)["checkpoints"]
    assert [one["path"] for one in listed] == [f"xorl://{MINE}/weights/two"]
    info = house.bob.rig.ok(house.bob.rig.http.get("/api/v1/session_info"))
    assert info["registered_models"] == [MINE]
    runs = house.bob.rig.ok(house.bob.rig.http.get("/api/v1/training_runs"))["training_runs"]
    assert [run["training_run_id"] for run in runs] == [MINE]
    assert house.bob.rig.http.get(f"/api/v1/training_runs/{MINE}").status_code == 200


def test_lists_hold_nothing_of_another_tenant(house: House) -> None:
    for path in ("/api/v1/session_info", "/api/v1/training_runs"):
        assert MINE not in house.bob.rig.http.get(path).text


def test_a_load_of_another_tenants_checkpoint_is_left_to_the_worker_under_the_callers_own_name(house: House) -> None:
    house.bob.make("own")
    accepted = house.bob.post("load_weights", model_id="own", path=f"xorl://{MINE}/weights/one")
    assert accepted.status_code == 200
    assert house.bob.outcome(accepted) == {"path": f"xorl://{MINE}/weights/one"}
    stored = [path for path in house.alice.rig.worker.loaded if path.endswith("/one")]
    assert stored == [f"tinker://bob:{MINE}/weights/one"]


def test_a_stranger_is_tried_on_every_route(house: House) -> None:
    document = house.alice.rig.ok(house.alice.rig.http.get("/openapi.json"))
    routes = {
        path.removeprefix("/xorl").removeprefix("/api/v1/") for path in document["paths"] if path.startswith("/xorl/")
    }
    tried = {name.split(",")[0] for name in CALLS}
    assert routes - NAMELESS - tried == set(), "add a call to CALLS, or say in NAMELESS that there is nothing to try"
