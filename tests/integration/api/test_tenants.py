"""What belongs to one tenant is, for every call of another one, exactly as if it did not exist."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from tests.support.bodies import good_datum, proto_request
from tests.support.cards import MODEL_NAME
from tests.support.rig import FAST, Rig, running_rig

from gradstream.shared.ids import TenantId
from gradstream.shared.keys import change_keys, mint

# How long a client waits for an answer. Polls are held for longer, so a stranger's poll that is held fails.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Things:
    """Ids of one tenant's things, or of nothing at all."""

    session: str
    model: str
    checkpoint: str
    sampler: str
    ephemeral: str
    future: str
    pending: str
    export: str


@dataclass(frozen=True, slots=True)
class House:
    """One server, two tenants, and what the first one has."""

    alice: Rig
    bob: Rig
    things: Things
    keys_file: Path
    alice_key: str


@pytest.fixture
def house(redis_url: str, engine_name: str, tmp_path: Path) -> Iterator[House]:
    path = tmp_path / "keys.json"
    texts = [add_key(path, name) for name in ("alice", "bob")]
    config = replace(FAST, keys_file=path, poll_hold_s=10 * PATIENCE_S)
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(running_rig(redis_url, engine=engine_name, config=config))
        alice, bob = (stack.enter_context(client_of(rig, text)) for text in texts)
        yield House(alice=alice, bob=bob, things=things_of(alice), keys_file=path, alice_key=texts[0])


def add_key(path: Path, tenant: str) -> str:
    made = mint(TenantId(tenant), created_ms=0)
    change_keys(path, lambda keys: (*keys, made.stored))
    return made.text


@contextlib.contextmanager
def client_of(rig: Rig, key: str) -> Iterator[Rig]:
    with httpx.Client(base_url=rig.base_url, timeout=PATIENCE_S, headers={"X-API-Key": key}) as http:
        yield replace(rig, http=http)


def things_of(rig: Rig) -> Things:
    session = rig.session()
    model = rig.model(session)
    future = rig.ok(rig.train(model, 1))["request_id"]
    rig.result(future)
    saved = rig.ok(rig.post("save_weights", {"model_id": model, "seq_id": 2, "path": "mine"}))
    named = {"model_id": model, "seq_id": 3, "path": "named"}
    rig.result(rig.ok(rig.post("save_weights_for_sampler", named))["request_id"])
    frozen = {"model_id": model, "seq_id": 4, "sampling_session_seq_id": 1}
    ephemeral = rig.result(rig.ok(rig.post("save_weights_for_sampler", frozen))["request_id"])
    sampler = rig.ok(
        rig.post(
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL_NAME},
        )
    )
    checkpoint = rig.result(saved["request_id"])["path"]
    return Things(
        session=session,
        model=model,
        checkpoint=checkpoint,
        sampler=sampler["sampling_session_id"],
        ephemeral=ephemeral["sampling_session_id"],
        future=future,
        # Held for seq 8, which never comes.
        pending=rig.ok(rig.step(model, 9))["request_id"],
        export=rig.ok(rig.post("gradstream/exports", {"path": checkpoint}))["export_id"],
    )


def of_nobody(things: Things) -> Things:
    """Ids of the same form and length that name nothing."""
    other = "0" * len(things.session)
    return Things(*(getattr(things, name).replace(things.session, other) for name in Things.__slots__))


Call = Callable[[Rig, Things], httpx.Response]
_PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
_LORA = {"base_model": MODEL_NAME, "lora_config": {"rank": 8}}


def ordered(route: str, **fields: object) -> Call:
    return lambda rig, things: rig.post(route, {"model_id": things.model, "seq_id": 5, **fields})


def of_session(route: str, **fields: object) -> Call:
    return lambda rig, things: rig.post(route, {"session_id": things.session, **fields})


def sample(rig: Rig, **fields: object) -> httpx.Response:
    params = {"max_tokens": 1}
    return rig.post("asample", {"prompt": _PROMPT, "num_samples": 1, "sampling_params": params, **fields})


def train_json(rig: Rig, things: Things, route: str) -> httpx.Response:
    targets = {"data": [1, 2], "dtype": "int64", "shape": [2]}
    data = [{"model_input": _PROMPT, "loss_fn_inputs": {"target_tokens": targets}}]
    content = {"data": data, "loss_fn": "cross_entropy"}
    return rig.post(route, {"model_id": things.model, "seq_id": 5, f"{route}_input": content})


def _checkpoint(things: Things) -> str:
    return f"/api/v1/training_runs/{things.model}/checkpoints/weights/mine"


# Every call that names something, by route; the names say in which way.
CALLS: dict[str, Call] = {
    "session_heartbeat": of_session("session_heartbeat"),
    "sessions/{session_id}/finish": lambda rig, things: rig.post(
        f"sessions/{things.session}/finish", {"reason": {"type": "success"}}
    ),
    "sessions/{session_id}": lambda rig, things: rig.http.get(f"/api/v1/sessions/{things.session}"),
    "sessions/{session_id}/project": lambda rig, things: rig.http.put(
        f"/api/v1/sessions/{things.session}/project", json={"project_id": "p"}
    ),
    "sessions/{session_id}/trace_export": lambda rig, things: rig.http.get(
        f"/api/v1/sessions/{things.session}/trace_export"
    ),
    "training_runs/{run_id}": lambda rig, things: rig.http.get(f"/api/v1/training_runs/{things.model}"),
    "training_runs/{run_id}/checkpoints": lambda rig, things: rig.http.get(
        f"/api/v1/training_runs/{things.model}/checkpoints"
    ),
    "training_runs/{run_id}/checkpoints/{checkpoint_id}": lambda rig, things: rig.http.delete(_checkpoint(things)),
    "training_runs/{run_id}/checkpoints/{checkpoint_id}/ttl": lambda rig, things: rig.http.put(
        f"{_checkpoint(things)}/ttl", json={"ttl_seconds": 7200}
    ),
    "training_runs/{run_id}/checkpoints/{checkpoint_id}/publish": lambda rig, things: rig.http.post(
        f"{_checkpoint(things)}/publish"
    ),
    "training_runs/{run_id}/checkpoints/{checkpoint_id}/publish, back": lambda rig, things: rig.http.delete(
        f"{_checkpoint(things)}/publish"
    ),
    "training_runs/{run_id}/checkpoints/{checkpoint_id}/archive": lambda rig, things: rig.http.get(
        f"{_checkpoint(things)}/archive"
    ),
    "training_runs/{run_id}/checkpoints/{checkpoint_id}/external_weights_urls": lambda rig, things: rig.http.get(
        f"{_checkpoint(things)}/external_weights_urls"
    ),
    "create_model": of_session("create_model", model_seq_id=7, **_LORA),
    "create_model, taken": of_session("create_model", model_seq_id=0, **_LORA),
    "get_info": lambda rig, things: rig.post("get_info", {"model_id": things.model}),
    "unload_model": lambda rig, things: rig.post("unload_model", {"model_id": things.model}),
    "forward_backward": lambda rig, things: rig.train(things.model, 5),
    "forward_backward, used": lambda rig, things: rig.train(things.model, 1),
    "forward_backward, refused": lambda rig, things: rig.send(
        proto_request(things.model, 5, [good_datum()], loss_fn="none").SerializeToString()
    ),
    "forward_backward, JSON": lambda rig, things: train_json(rig, things, "forward_backward"),
    "forward": lambda rig, things: train_json(rig, things, "forward"),
    "optim_step": ordered("optim_step", adam_params={}),
    "optim_step, refused": ordered("optim_step", adam_params={"beta1": 2}),
    "save_weights": ordered("save_weights", path="x"),
    "save_weights_for_sampler": ordered("save_weights_for_sampler", path="x"),
    "save_weights_external": ordered("save_weights_external", path="x"),
    "weights_info": lambda rig, things: rig.post("weights_info", {"tinker_path": things.checkpoint}),
    "load_weights": lambda rig, things: rig.post(
        "load_weights", {"model_id": things.model, "seq_id": 5, "path": things.checkpoint, "optimizer": True}
    ),
    "load_weights, own session": lambda rig, things: rig.post(
        "load_weights",
        {"session_id": rig.session(), "model_seq_id": 0, "path": things.checkpoint, "optimizer": True},
    ),
    "load_weights, session": of_session("load_weights", model_seq_id=7, path="tinker://m/weights/x", optimizer=True),
    "create_sampling_session": of_session("create_sampling_session", sampling_session_seq_id=0, base_model=MODEL_NAME),
    "create_sampling_session, path": lambda rig, things: rig.post(
        "create_sampling_session",
        {
            "session_id": rig.session(),
            "sampling_session_seq_id": 0,
            "model_path": things.checkpoint.replace("/weights/mine", "/sampler_weights/named"),
        },
    ),
    "samplers/{sampler_id}": lambda rig, things: rig.http.get(f"/api/v1/samplers/{things.sampler}"),
    "samplers/{sampler_id}, ephemeral": lambda rig, things: rig.http.get(f"/api/v1/samplers/{things.ephemeral}"),
    "asample": lambda rig, things: sample(rig, sampling_session_id=things.sampler, seq_id=0),
    "asample, ephemeral": lambda rig, things: sample(rig, sampling_session_id=things.ephemeral, seq_id=0),
    "asample, path": lambda rig, things: sample(
        rig, model_path=things.checkpoint.replace("/weights/mine", "/sampler_weights/named")
    ),
    "join_sampling_session": lambda rig, things: rig.post(
        "join_sampling_session", {"sampling_session_id": things.sampler}
    ),
    "retrieve_futures": lambda rig, things: rig.post(
        "retrieve_futures", {"target": {"sampling_session_id": things.sampler}, "timeout": 0}
    ),
    "gradstream/exports": lambda rig, things: rig.post("gradstream/exports", {"path": things.checkpoint}),
    "gradstream/exports/{export}": lambda rig, things: rig.http.get(f"/api/v1/gradstream/exports/{things.export}"),
    "gradstream/exports/{export}, deleted": lambda rig, things: rig.http.delete(
        f"/api/v1/gradstream/exports/{things.export}"
    ),
    "gradstream/exports/{export}/urls": lambda rig, things: rig.http.get(
        f"/api/v1/gradstream/exports/{things.export}/urls"
    ),
    "retrieve_future": lambda rig, things: rig.poll(things.future),
    "retrieve_future, pending": lambda rig, things: rig.poll(things.pending),
    "retrieve_future, passed": lambda rig, things: rig.poll(things.future[:-1] + "3"),
}
# Calls that name nothing of anybody's, and say nothing of anybody.
NAMELESS = {
    *("client/config", "client/dynamic_config", "healthz", "get_server_capabilities", "telemetry", "create_session"),
    *("audit", "billing/usage/events"),
    # Whoever holds a token may use it; nobody can guess one.
    "downloads/{token}/{name}",
    # Refused before it is read; and one that answers everything alike, whatever it did.
    *("create_custom_loss", "copy_weights", "cancel_future"),
}
# Calls that answer with what the caller has.
LISTS: dict[str, Call] = {
    "sessions": lambda rig, _: rig.http.get("/api/v1/sessions"),
    "sessions/search": lambda rig, _: rig.post("sessions/search", {}),
    "sessions/search, by id": lambda rig, things: rig.post("sessions/search", {"session_id": things.session}),
    "training_runs": lambda rig, _: rig.http.get("/api/v1/training_runs?access_scope=accessible"),
    "gradstream/exports, listed": lambda rig, _: rig.http.get("/api/v1/gradstream/exports"),
    "checkpoints": lambda rig, _: rig.http.get("/api/v1/checkpoints"),
    "auth/apikey/me": lambda rig, _: rig.http.get("/api/v1/auth/apikey/me"),
    "billing/usage/checkpoints/current": lambda rig, _: rig.http.get("/api/v1/billing/usage/checkpoints/current"),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_tenants_thing_is_answered_like_one_that_never_was(house: House, name: str) -> None:
    call = CALLS[name]
    foreign, unknown = call(house.bob, house.things), call(house.bob, of_nobody(house.things))
    other = of_nobody(house.things).session
    assert foreign.status_code == unknown.status_code
    assert foreign.status_code in ({400, 404} if "refused" in name else {404})
    assert foreign.text.replace(house.things.session, other) == unknown.text


def test_nothing_that_another_tenant_tried_has_changed_anything(house: House) -> None:
    for call in CALLS.values():
        call(house.bob, house.things)
    alice, things = house.alice, house.things
    assert alice.ok(alice.post("session_heartbeat", {"session_id": things.session}))
    assert alice.result(alice.ok(alice.train(things.model, 5))["request_id"])["metrics"]
    for seq in (6, 7, 8):
        assert alice.ok(alice.step(things.model, seq))
    assert alice.result(things.pending)["metrics"]
    assert alice.ok(alice.http.get(f"/api/v1/samplers/{things.sampler}"))
    assert all(owner.startswith(things.session) for owner, _, _ in house.alice.worker.seen)


def test_an_in_place_load_of_another_tenants_checkpoint_is_left_to_the_worker_like_one_that_never_was(
    house: House,
) -> None:
    bob, nobody = house.bob, of_nobody(house.things)
    model = bob.model()
    for seq, things in enumerate((house.things, nobody), start=1):
        body = {"model_id": model, "seq_id": seq, "path": things.checkpoint, "optimizer": True}
        assert bob.post("load_weights", body).status_code == 200


@pytest.mark.parametrize("name", LISTS)
def test_a_list_holds_nothing_of_another_tenant(house: House, name: str) -> None:
    listed = LISTS[name](house.bob, house.things)
    assert house.things.session not in listed.text
    assert "alice" not in listed.text


def test_a_stranger_is_tried_on_every_route(house: House) -> None:
    document = house.alice.ok(httpx.get(f"{house.alice.base_url}/openapi.json", timeout=PATIENCE_S))
    routes = {path.removeprefix("/api/v1/") for path in document["paths"] if not path.startswith("/xorl/")}
    tried = {name.split(",")[0] for name in (*CALLS, *LISTS)}
    assert routes - NAMELESS - tried == set(), (
        "add a call to CALLS or LISTS, or say in NAMELESS that there is nothing to try"
    )
