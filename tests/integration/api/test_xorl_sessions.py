"""Sessions of xorl clients: made, kept alive, looked at, put to sleep and killed."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest
import redis
from tests.support.api_server import api_server
from tests.support.cards import UNIFORM_CARD
from tests.support.echo_worker import echo_worker
from tests.support.rig import FAST, LIMITS, Rig
from tests.support.xorl import Xorl

from gradstream.api.names import Target
from gradstream.api.parts import Parts
from gradstream.api.xorl import kill
from gradstream.api.xorl.submitting import submit
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.keys import Keys
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import AdamParams, OptimStep, Payload, ResetModel

# How a kill ends a model of this name.
END = {"policy": "unload_model", "default": "reset_model"}


@pytest.fixture
def xorl(rig: Rig) -> Xorl:
    return Xorl(rig)


@pytest.fixture
def full(redis_url: str, engine_name: str):
    """A server that trains full weights."""
    card = msgspec.structs.replace(UNIFORM_CARD, is_lora=False)
    with (
        echo_worker(redis_url, engine=engine_name, card=card) as worker,
        api_server(redis_url, engine=engine_name, config=FAST, limits=LIMITS) as base_url,
        httpx.Client(base_url=base_url, timeout=60) as http,
    ):
        yield Xorl(Rig(base_url, http, worker))


def ops(xorl: Xorl, model: str) -> list[str]:
    return [op for owner, _, op in xorl.rig.worker.seen if owner == model]


def test_a_session_is_a_model_that_takes_jobs_at_once(xorl: Xorl) -> None:
    made = xorl.ok("create_session", session_id="mine", base_model="tests/uniform", lora_config={"rank": 4})
    assert (made["type"], made["session_id"], made["error_message"]) == ("create_session", "mine", None)
    xorl.step("mine")
    assert xorl.ok("get_info", model_id="mine")["lora_rank"] == 4


def test_a_session_without_a_name_gets_one(xorl: Xorl) -> None:
    names = {xorl.ok("create_session", base_model="tests/uniform")["session_id"] for _ in range(2)}
    assert len(names) == 2
    for name in names:
        xorl.step(name)


def test_a_session_that_exists_otherwise_is_refused(xorl: Xorl) -> None:
    xorl.ok("create_session", session_id="mine", lora_config={"rank": 4})
    xorl.ok("create_session", session_id="mine", lora_config={"rank": 4})
    refused = xorl.post("create_session", session_id="mine", lora_config={"rank": 5})
    assert refused.status_code == 400
    assert "lora.rank was 4, now 5" in refused.json()["detail"]


def test_a_heartbeat_is_a_sign_of_life_and_unknown_sessions_have_none(
    xorl: Xorl, redis_url: str, engine_name: str
) -> None:
    xorl.make("mine")
    began_ms = time.time_ns() // 10**6
    assert xorl.ok("session_heartbeat", session_id="mine") == {"type": "session_heartbeat"}
    with RedisCensus(redis_url, engine=engine_name) as census:
        record = census.record(RecordKind.MODEL, "mine")
    assert record is not None
    assert int(record["seen_ms"]) >= began_ms
    assert xorl.post("session_heartbeat", session_id="nobody").status_code == 404


def test_the_session_info_tells_which_models_are_in_memory_and_in_use(xorl: Xorl) -> None:
    for name in ("one", "two", "gone"):
        xorl.make(name)
    xorl.done("unload_model", model_id="gone")
    xorl.rig.worker.pause()
    xorl.ok("optim_step", model_id="one", adam_params={"learning_rate": 1e-4})
    info = xorl.rig.ok(xorl.rig.http.get("/api/v1/session_info"))
    xorl.rig.worker.resume()
    assert sorted(info["registered_models"]) == sorted(info["loaded_training_adapters"]) == ["one", "two"]
    assert info["active_sessions"] == ["one"]
    assert info["session_activity"]["one"]["open_jobs"] == 1
    assert abs(info["session_activity"]["two"]["last_active"] - time.time()) < 60
    assert info["idle_timeout_seconds"] == FAST.idle_session_timeout_s


def test_killing_saves_a_final_checkpoint_behind_all_jobs_and_unloads(xorl: Xorl) -> None:
    xorl.make("policy")
    xorl.ok("optim_step", model_id="policy", adam_params={"learning_rate": 1e-4})
    killed = xorl.ok("kill_session", model_id="policy")
    assert killed["success"]
    assert killed["checkpoint_path"] == "xorl://policy/weights/session_policy_final"
    assert ops(xorl, "policy") == ["create_model", "optim_step", "save_weights", "unload_model"]
    refused = xorl.post("optim_step", model_id="policy", adam_params={"learning_rate": 1e-4})
    assert refused.status_code == 404
    assert f"its last checkpoint is {killed['checkpoint_path']}" in refused.json()["detail"]
    xorl.make("policy")
    assert xorl.done("load_weights", model_id="policy", path=killed["checkpoint_path"])


def test_a_kill_that_is_repeated_gives_the_same_answer_and_does_nothing_twice(xorl: Xorl) -> None:
    xorl.make("policy")
    xorl.step("policy")
    answers = [xorl.ok("kill_session", model_id="policy") for _ in range(2)]
    assert answers[0] == answers[1]
    assert ops(xorl, "policy").count("save_weights") == 1


def forget_result(redis_url: str, engine_name: str, future: str) -> None:
    """As when the time for which it is kept is over."""
    with redis.Redis.from_url(redis_url) as raw:
        assert raw.delete(Keys(engine_name).future(FutureId(future)))


@pytest.mark.parametrize("model", ["policy", "default"])
def test_a_kill_that_is_repeated_when_its_result_is_gone_gives_the_same_answer(
    xorl: Xorl, redis_url: str, engine_name: str, model: str
) -> None:
    if model != "default":
        xorl.make(model)
    xorl.step(model)
    first = xorl.ok("kill_session", model_id=model)
    number = len(ops(xorl, model)) - 1
    forget_result(redis_url, engine_name, f"{model}:{number}")
    assert xorl.ok("kill_session", model_id=model) == first
    assert len(ops(xorl, model)) == number + 1


def test_kills_at_the_same_time_are_one(xorl: Xorl) -> None:
    xorl.make("policy")
    xorl.step("policy")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: xorl.post("kill_session", model_id="policy"), range(8)))
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    assert {answer.json()["checkpoint_path"] for answer in answers} == {"xorl://policy/weights/session_policy_final"}
    assert ops(xorl, "policy") == ["create_model", "optim_step", "save_weights", "unload_model"]


@pytest.mark.parametrize("model", ["policy", "default"])
def test_a_kill_that_comes_late_with_its_note_takes_nothing_back(
    xorl: Xorl, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """The late one stands between its look at the record and its first note while the first one goes all the way."""
    if model != "default":
        xorl.make(model)
    xorl.step(model)
    saving = kill._saving
    answers: list[dict[str, Any]] = []

    async def late(*args: Any, **options: Any) -> kill._Progress:
        monkeypatch.setattr(kill, "_saving", saving)
        answers.append(await asyncio.to_thread(xorl.ok, "kill_session", model_id=model))
        try:
            return await saving(*args, **options)
        finally:
            answers.append(await asyncio.to_thread(xorl.ok, "kill_session", model_id=model))

    monkeypatch.setattr(kill, "_saving", late)
    answers.append(xorl.ok("kill_session", model_id=model))
    assert [answer["checkpoint_path"] for answer in answers] == [f"xorl://{model}/weights/session_{model}_final"] * 3
    assert ops(xorl, model)[1:] == ["optim_step", "save_weights", END[model]]


def test_a_kill_that_did_not_yet_note_its_end_is_known_to_others(xorl: Xorl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next one would save the weights that the model began anew with over those that were trained."""
    xorl.step("default")
    submit_job = kill._submit
    answers: list[dict[str, Any]] = []

    async def slow(parts: Parts, meant: Target, payload: Payload, *, seq: int) -> FutureId:
        future = await submit_job(parts, meant, payload, seq=seq)
        if isinstance(payload, ResetModel):
            monkeypatch.setattr(kill, "_submit", submit_job)
            answers.append(await asyncio.to_thread(xorl.ok, "kill_session", reset_weights=True))
        return future

    monkeypatch.setattr(kill, "_submit", slow)
    answers.append(xorl.ok("kill_session", reset_weights=True))
    assert answers[0] == answers[1]
    assert ops(xorl, "default")[1:] == ["optim_step", "save_weights", "reset_model"]


def test_a_kill_that_broke_off_in_its_save_tells_the_checkpoint_of_a_model_that_was_unloaded_since(
    xorl: Xorl, monkeypatch: pytest.MonkeyPatch
) -> None:
    xorl.make("policy")
    xorl.rig.worker.pause()
    monkeypatch.setattr(kill, "WAIT_S", 0.0)
    assert xorl.post("kill_session", model_id="policy").status_code == 503
    xorl.ok("unload_model", model_id="policy")
    monkeypatch.setattr(kill, "WAIT_S", 20.0)
    xorl.rig.worker.resume()
    assert xorl.ok("kill_session", model_id="policy")["checkpoint_path"] == "xorl://policy/weights/session_policy_final"
    assert ops(xorl, "policy") == ["create_model", "save_weights", "unload_model"]


@pytest.mark.parametrize("rate", [1e-4, 666.0], ids=["done", "failed"])
def test_a_kill_that_broke_off_before_its_save_was_submitted_does_not_take_another_job_for_it(
    xorl: Xorl, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    xorl.make("policy")
    submit_job = kill._submit

    async def broken(*_args: object, **_fields: object) -> FutureId:
        raise Unavailable("the process ends here")

    monkeypatch.setattr(kill, "_submit", broken)
    assert xorl.post("kill_session", model_id="policy").status_code == 503
    monkeypatch.setattr(kill, "_submit", submit_job)
    xorl.outcome(xorl.post("optim_step", model_id="policy", adam_params={"learning_rate": rate}))
    killed = xorl.ok("kill_session", model_id="policy")
    assert killed["success"], killed
    assert killed["checkpoint_path"] == "xorl://policy/weights/session_policy_final"
    assert ops(xorl, "policy") == ["create_model", "optim_step", "save_weights", "unload_model"]


def test_what_is_trained_between_the_save_and_the_end_is_saved_too(xorl: Xorl, monkeypatch: pytest.MonkeyPatch) -> None:
    xorl.make("policy")
    ending = kill._ending

    async def trained_meanwhile(parts: Parts, meant: Target, *args: Any) -> kill._Progress:
        monkeypatch.setattr(kill, "_ending", ending)
        await submit(parts, meant, OptimStep(adam=AdamParams()), seq_id=None)
        return await ending(parts, meant, *args)

    monkeypatch.setattr(kill, "_ending", trained_meanwhile)
    assert xorl.ok("kill_session", model_id="policy")["success"]
    assert ops(xorl, "policy") == ["create_model", "save_weights", "optim_step", "save_weights", "unload_model"]


def test_a_model_whose_unload_waits_is_over_for_every_call(xorl: Xorl) -> None:
    xorl.make("policy")
    xorl.rig.worker.pause()
    xorl.ok("unload_model", model_id="policy")
    info = xorl.rig.ok(xorl.rig.http.get("/api/v1/session_info"))
    killed = xorl.ok("kill_session", model_id="policy")
    xorl.rig.worker.resume()
    assert info["registered_models"] == []
    assert killed["message"] == "there is no active session to kill"


def test_a_model_made_again_behind_its_unload_is_a_session(xorl: Xorl) -> None:
    xorl.make("policy")
    xorl.rig.worker.pause()
    xorl.ok("unload_model", model_id="policy")
    xorl.ok("create_model", model_id="policy", lora_config={"rank": 8})
    info = xorl.rig.ok(xorl.rig.http.get("/api/v1/session_info"))
    xorl.rig.worker.resume()
    assert info["registered_models"] == ["policy"]
    assert xorl.ok("kill_session", model_id="policy")["checkpoint_path"]


def test_a_kill_after_more_training_saves_again(xorl: Xorl) -> None:
    xorl.step("default")
    xorl.ok("kill_session")
    xorl.step("default")
    xorl.ok("kill_session")
    assert ops(xorl, "default")[1:] == ["optim_step", "save_weights", "reset_model"] * 2


def test_killing_without_a_checkpoint_saves_none(xorl: Xorl) -> None:
    xorl.make("policy")
    killed = xorl.ok("kill_session", model_id="policy", save_checkpoint=False)
    assert (killed["success"], killed["checkpoint_path"]) == (True, None)
    assert ops(xorl, "policy") == ["create_model", "unload_model"]


def test_a_session_whose_checkpoint_cannot_be_saved_is_not_killed(xorl: Xorl) -> None:
    xorl.make("too-large")
    killed = xorl.ok("kill_session", model_id="too-large")
    assert not killed["success"]
    assert "nothing was done, as the checkpoint was not saved: the save needs more room" in killed["message"]
    xorl.step("too-large")
    assert not xorl.ok("kill_session", model_id="too-large")["success"]
    assert ops(xorl, "too-large").count("save_weights") == 2


def test_there_is_nothing_to_kill_before_the_first_use_and_after_an_unload(xorl: Xorl) -> None:
    nothing = {"success": True, "message": "there is no active session to kill", "checkpoint_path": None}
    assert xorl.ok("kill_session") == nothing
    xorl.make("policy")
    xorl.done("unload_model", model_id="policy")
    assert xorl.ok("kill_session", model_id="policy") == nothing
    assert xorl.post("kill_session", model_id="nobody").status_code == 404


@pytest.mark.parametrize("reset_weights", [False, True])
def test_the_model_that_needs_no_making_begins_anew_with_or_without_its_weights(
    full: Xorl, reset_weights: bool
) -> None:
    full.step()
    killed = full.ok("kill_session", model_id="default", reset_weights=reset_weights)
    assert killed["success"]
    assert ("first weights" in killed["message"]) is reset_weights
    assert ops(full, "default") == ["create_model", "optim_step", "save_weights", "reset_model"]
    full.step()


def test_a_name_as_long_as_names_may_be_has_a_final_checkpoint_too(xorl: Xorl) -> None:
    name = xorl.make("m" * 128)
    path = xorl.ok("kill_session", model_id=name)["checkpoint_path"]
    assert path.startswith(f"xorl://{name}/weights/session_mmm")
    assert path.endswith("_final")


def test_a_kill_that_takes_too_long_says_so_and_goes_on_when_it_is_sent_again(
    xorl: Xorl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstream.api.xorl.kill.WAIT_S", 0.3)
    xorl.make("policy")
    xorl.rig.worker.pause()
    early = xorl.post("kill_session", model_id="policy")
    xorl.rig.worker.resume()
    assert early.status_code == 503
    assert int(early.headers["retry-after"]) >= 1
    monkeypatch.setattr("gradstream.api.xorl.kill.WAIT_S", 20.0)
    assert xorl.ok("kill_session", model_id="policy")["success"]
    assert ops(xorl, "policy") == ["create_model", "save_weights", "unload_model"]


def test_a_server_of_full_weights_sleeps_behind_its_jobs_and_wakes_up(full: Xorl) -> None:
    full.step()
    asleep = full.rig.ok(full.rig.http.post("/sleep"))
    awake = full.rig.ok(full.rig.http.post("/wake_up", json={}))
    assert (asleep["status"], awake["status"]) == ("sleeping", "awake")
    assert asleep["bytes_moved"] == 8
    assert ops(full, "default") == ["create_model", "optim_step", "offload_model", "offload_model"]


def test_a_server_of_adapters_does_not_sleep(xorl: Xorl) -> None:
    for path in ("/sleep", "/wake_up"):
        refused = xorl.rig.http.post(path)
        assert refused.status_code == 400
        assert "only one that trains full weights can sleep" in refused.json()["detail"]
    assert xorl.rig.worker.seen == []


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/api/v1/save_full_weights_safetensors", "save_weights_for_sampler"),
        ("/api/v1/update_dedicated_endpoint", "uploads to no model hub"),
        ("/api/v1/update_serverless_weights", "uploads to no model hub"),
        ("/api/v1/set_sync_quantization", "nothing to quantize"),
        ("/connect_inference_endpoint", "add_inference_endpoint"),
        ("/disconnect_inference_endpoint", "add_inference_endpoint"),
    ],
)
def test_calls_that_no_server_answers_say_what_to_do_instead(xorl: Xorl, path: str, advice: str) -> None:
    refused = xorl.rig.http.post(path, content=b"\xff" * 10, headers={"content-type": "application/json"})
    assert refused.status_code == 404
    assert advice in refused.json()["detail"]
