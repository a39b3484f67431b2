"""The SDK's REST client and the calls behind its command line: runs, checkpoints, sessions, storage."""

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import tinker
from tests.support.cards import MODEL_NAME
from tests.support.polling import wait_until
from tests.support.rig import Rig
from tinker import types
from tinker.lib.public_interfaces.admin_client import AdminClient
from tinker.lib.public_interfaces.rest_client import RestClient


@pytest.fixture
def sdk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    """A client of the rig."""
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    client = tinker.ServiceClient(base_url=rig.base_url, user_metadata={"who": "contract"})
    yield client
    client.holder.close()


@pytest.fixture
def rest(sdk: tinker.ServiceClient) -> RestClient:
    return sdk.create_rest_client()


@pytest.fixture
def training(sdk: tinker.ServiceClient) -> tinker.TrainingClient:
    """A client of a new model."""
    return sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8, user_metadata={"renderer_name": "plain"})


def test_a_training_run_shows_its_model_metadata_and_last_checkpoints(
    rest: RestClient, training: tinker.TrainingClient
) -> None:
    first = training.save_state("a", ttl_seconds=7200).result().path
    frozen = training.save_weights_for_sampler("b").result().path
    run = rest.get_training_run_by_tinker_path(first).result()
    assert (run.training_run_id, run.base_model, run.lora_rank) == (training.model_id, MODEL_NAME, 8)
    assert (run.is_lora, run.corrupted, run.model_owner) == (True, False, "local")
    assert run.user_metadata == {"renderer_name": "plain"}
    assert abs(datetime.now(UTC) - run.last_request_time) < timedelta(minutes=5)
    assert run.last_checkpoint is not None
    assert run.last_sampler_checkpoint is not None
    assert (run.last_checkpoint.tinker_path, run.last_sampler_checkpoint.tinker_path) == (first, frozen)


def test_training_runs_come_newest_first_in_pages_and_survive_unload(
    rest: RestClient, sdk: tinker.ServiceClient, rig: Rig
) -> None:
    made = []
    for _ in range(3):
        made.append(sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8).model_id)
        time.sleep(0.002)
    rig.result(rig.ok(rig.post("unload_model", {"model_id": made[2]}))["request_id"])
    page = rest.list_training_runs(limit=2, offset=0).result()
    assert [run.training_run_id for run in page.training_runs] == [made[2], made[1]]
    assert (page.cursor.offset, page.cursor.limit, page.cursor.total_count) == (0, 2, 3)
    rest_of = rest.list_training_runs(limit=2, offset=2).result()
    assert [run.training_run_id for run in rest_of.training_runs] == [made[0]]


def test_an_unknown_training_run_is_a_plain_404(rest: RestClient) -> None:
    start_s = time.monotonic()
    with pytest.raises(tinker.NotFoundError, match="there is no model"):
        rest.get_training_run(f"{uuid.uuid4()}:train:0").result()
    assert time.monotonic() - start_s < 60


def test_checkpoints_of_a_run_and_of_the_user_are_listed_with_their_facts(
    rest: RestClient, training: tinker.TrainingClient, sdk: tinker.ServiceClient
) -> None:
    training.save_state("a", ttl_seconds=604_800).result()
    time.sleep(0.002)
    training.save_weights_for_sampler("b").result()
    time.sleep(0.002)
    other = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)
    other.save_state("c").result()
    own = rest.list_checkpoints(training.model_id).result().checkpoints
    assert [(item.checkpoint_id, item.checkpoint_type) for item in own] == [
        ("sampler_weights/b", "sampler"),
        ("weights/a", "training"),
    ]
    assert own[0].expires_at is None
    assert own[1].expires_at is not None
    assert own[1].expires_at - own[1].time == timedelta(seconds=604_800)
    assert (own[1].size_bytes, own[1].public) == (1000, False)
    page = rest.list_user_checkpoints(limit=2, offset=0).result()
    assert [item.tinker_path.rsplit("/", 1)[1] for item in page.checkpoints] == ["c", "b"]
    assert page.cursor is not None
    assert page.cursor.total_count == 3


def test_a_deleted_checkpoint_is_gone_from_lists_and_cannot_be_loaded(
    rest: RestClient, training: tinker.TrainingClient, sdk: tinker.ServiceClient, rig: Rig
) -> None:
    path = training.save_state("a").result().path
    rig.worker.pause()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(training.model_id).result().checkpoints == []
    with pytest.raises(tinker.NotFoundError):
        sdk.create_training_client_from_state(path).get_info()
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()
    rig.worker.resume()
    # The file job stands before a later save of the same name, which therefore stays.
    assert training.save_state("a").result().path == path
    assert rig.worker.seen[-2][2] == "delete_checkpoint"
    assert [item.tinker_path for item in rest.list_checkpoints(training.model_id).result().checkpoints] == [path]


def test_a_checkpoint_is_published_and_unpublished(rest: RestClient, training: tinker.TrainingClient) -> None:
    path = training.save_state("a").result().path
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(training.model_id).result().checkpoints[0].public
    with pytest.raises(tinker.BadRequestError, match="is public already"):
        rest.publish_checkpoint_from_tinker_path(path).result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not rest.list_checkpoints(training.model_id).result().checkpoints[0].public
    with pytest.raises(tinker.BadRequestError, match="is private already"):
        rest.unpublish_checkpoint_from_tinker_path(path).result()


def test_a_time_to_live_is_set_and_removed(rest: RestClient, training: tinker.TrainingClient) -> None:
    path = training.save_state("a").result().path
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    (found,) = rest.list_checkpoints(training.model_id).result().checkpoints
    assert found.expires_at is not None
    assert timedelta(seconds=7000) < found.expires_at - datetime.now(UTC) <= timedelta(seconds=7200)
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    (found,) = rest.list_checkpoints(training.model_id).result().checkpoints
    assert found.expires_at is None


@pytest.mark.parametrize("ttl_seconds", [0, -1, 3599, 11 * 366 * 24 * 3600])
def test_a_time_to_live_out_of_bounds_is_refused(rig: Rig, ttl_seconds: int) -> None:
    answer = rig.http.put(
        "/api/v1/training_runs/a:train:0/checkpoints/weights/a/ttl", json={"ttl_seconds": ttl_seconds}
    )
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert "ttl_seconds" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "suffix"), [("DELETE", ""), ("PUT", "/ttl"), ("POST", "/publish"), ("DELETE", "/publish")]
)
@pytest.mark.parametrize(
    "checkpoint", ["weights/none", "weights/..", "weights/../../x", "else/a", "weights", "weights/a/b"]
)
def test_a_checkpoint_that_there_is_not_is_a_404(rig: Rig, method: str, suffix: str, checkpoint: str) -> None:
    url = f"/api/v1/training_runs/a:train:0/checkpoints/{checkpoint.replace('..', '%2e%2e')}{suffix}"
    body = {"json": {"ttl_seconds": None}} if method == "PUT" else {}
    answer = rig.http.request(method, url, **body)
    assert answer.status_code == 404, answer.text


def test_weights_info_tells_of_sampler_checkpoints_too(rest: RestClient, training: tinker.TrainingClient) -> None:
    frozen = training.save_weights_for_sampler("b").result().path
    info = rest.get_weights_info_by_tinker_path(frozen).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL_NAME, True, 8)


def test_sessions_are_listed_and_one_shows_its_runs_and_samplers(
    rest: RestClient, sdk: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    sampler = sdk.create_sampling_client(base_model=MODEL_NAME)
    session_id = training.model_id.split(":")[0]
    assert session_id in rest.list_sessions(limit=10).result().sessions
    session = rest.get_session(session_id).result()
    assert session.training_run_ids == [training.model_id]
    assert len(session.sampler_ids) == 1
    assert rest.get_sampler(session.sampler_ids[0]).result().base_model == MODEL_NAME
    assert session.user_metadata == {"who": "contract"}
    assert sampler is not None


def test_search_finds_sessions_by_name_metadata_status_and_pages(rig: Rig, rest: RestClient) -> None:
    ids = []
    for number in range(5):
        body = {
            "tags": [],
            "user_metadata": {"n": str(number)},
            "display_name": f"Blue Whale {number}",
            "project_id": "p",
        }
        ids.append(rig.ok(rig.post("create_session", body))["session_id"])
        time.sleep(0.002)
    rig.post(f"sessions/{ids[1]}/finish", {"reason": {"type": "success"}, "detail": "done"})
    found = rig.ok(rig.post("sessions/search", {"display_name": "whale BLUE", "limit": 2}))
    assert [item["session_id"] for item in found["sessions"]] == [ids[4], ids[3]]
    found = rig.ok(rig.post("sessions/search", {"display_name": "whale", "limit": 2, "cursor": found["next_cursor"]}))
    assert [item["session_id"] for item in found["sessions"]] == [ids[2], ids[1]]
    assert found["sessions"][1]["status"] == {
        "type": "client_finished",
        "reason": {"type": "success"},
        "detail": "done",
    }
    found = rig.ok(rig.post("sessions/search", {"display_name": "whale", "limit": 2, "cursor": found["next_cursor"]}))
    assert ([item["session_id"] for item in found["sessions"]], found["next_cursor"]) == ([ids[0]], None)
    by_metadata = rig.ok(rig.post("sessions/search", {"user_metadata": {"n": "3"}}))
    assert [item["session_id"] for item in by_metadata["sessions"]] == [ids[3]]
    finished = rig.ok(rig.post("sessions/search", {"statuses": [{"type": "client_finished", "reasons": ["success"]}]}))
    assert [item["session_id"] for item in finished["sessions"]] == [ids[1]]
    others = rig.ok(rig.post("sessions/search", {"owner": {"type": "user", "owner_urns": ["someone"]}}))
    assert others["sessions"] == []
    stock = rest.search_sessions(types.SessionSearchRequest(project_ids=["p"])).result()
    assert {item.session_id for item in stock.sessions} == set(ids)
    assert stock.sessions[0].checkpoints_count == 0


def test_a_session_is_put_under_a_project(rig: Rig, rest: RestClient) -> None:
    session_id = rig.session()
    rest.assign_session_project(session_id, "mine").result()
    found = rest.search_sessions(types.SessionSearchRequest(project_ids=["mine"])).result()
    assert [(item.session_id, item.project_id) for item in found.sessions] == [(session_id, "mine")]
    assert rig.http.get("/api/v1/sessions", params={"project_id": "mine"}).json() == {"sessions": [session_id]}


def test_a_trace_export_fails_with_its_reason(rest: RestClient, rig: Rig) -> None:
    with pytest.raises(RuntimeError, match="does not record session traces"):
        rest.export_session_trace(rig.session()).result()


def test_storage_usage_counts_checkpoints_and_bytes(
    sdk: tinker.ServiceClient, training: tinker.TrainingClient, rig: Rig
) -> None:
    training.save_state("a").result()
    training.save_state("b").result()
    usage = rig.ok(rig.http.get("/api/v1/billing/usage/checkpoints/current"))
    (row,) = usage["data"]
    assert (row["checkpoint_count"], row["size_bytes"], row["org_user_urn"]) == (2, 2000, "local")
    assert sdk is not None


def test_the_admin_client_reads_empty_bills_and_audits(rig: Rig) -> None:
    admin = AdminClient(base_url=rig.base_url, api_key="tml-test")
    assert admin.get_audit_log(event_type="all").result().entries == []
    assert rig.ok(rig.http.get("/api/v1/billing/usage/events"))["data"] == []


def test_a_login_learns_whose_key_it_is_and_a_key_cannot_delete_itself(rig: Rig) -> None:
    key = rig.ok(rig.http.get("/api/v1/auth/apikey/me"))
    assert (key["name"], key["details"]["user_details"]["email"]) == ("local", "local")
    answer = rig.http.delete("/api/v1/auth/apikey/me")
    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported")


@pytest.mark.parametrize(
    "url",
    [
        "training_runs?limit=0",
        "training_runs?limit=x",
        "training_runs?offset=-1",
        "training_runs?access_scope=all",
        "training_runs?colour=red",
        "checkpoints?limit=-5",
        "sessions?limit=99999999999999999999",
        "audit?day=yesterday",
    ],
)
def test_a_query_that_is_wrong_is_refused_by_name(rig: Rig, url: str) -> None:
    answer = rig.http.get(f"/api/v1/{url}")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert url.partition("?")[2].partition("=")[0] in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"limit": 0},
        {"limit": 201},
        {"display_name": ""},
        {"statuses": []},
        {"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": "a"}},
        {"owner": {"type": "nobody"}},
    ],
)
def test_a_search_that_is_wrong_is_refused_by_name(rig: Rig, body: dict[str, object]) -> None:
    answer = rig.post("sessions/search", body)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert next(iter(body)) in answer.json()["detail"]


def test_weights_are_copied_into_a_run_of_a_project(rest: RestClient, training: tinker.TrainingClient) -> None:
    path = training.save_state("a").result().path
    copied = rest.copy_weights(path, destination_project_id="archive", ttl_seconds=3600).result()
    run = rest.get_training_run_by_tinker_path(copied).result()
    assert copied == f"tinker://{run.training_run_id}/weights/a"
    assert run.training_run_id != training.model_id
    assert (run.base_model, run.lora_rank, run.corrupted) == (MODEL_NAME, 8, False)
    (checkpoint,) = rest.list_checkpoints(run.training_run_id).result().checkpoints
    assert (checkpoint.tinker_path, checkpoint.checkpoint_type) == (copied, "training")
    assert checkpoint.expires_at is not None
    assert 3500 < (checkpoint.expires_at - datetime.now(UTC)).total_seconds() <= 3600
    found = rest.list_training_runs(project_id="archive").result().training_runs
    assert [one.training_run_id for one in found] == [run.training_run_id]
    assert rest.copy_weights(path, destination_project_id="archive").result() != copied


def copied(rig: Rig, body: dict[str, object], *, key: str | None = None) -> dict[str, str]:
    """The answer once the copy is made; while the worker is busy, the server asks for the same request again."""
    answers = []

    def is_made() -> bool:
        answers.append(rig.post("copy_weights", body, headers={"x-idempotency-key": key} if key else {}))
        return answers[-1].status_code != 503

    wait_until(is_made)
    return rig.ok(answers[-1])


def test_a_copy_that_is_asked_for_again_is_the_same(training: tinker.TrainingClient, rig: Rig) -> None:
    path = training.save_weights_for_sampler("b").result().path
    slot = {"source_path": path, "session_id": rig.session(), "model_seq_id": 3}
    first = copied(rig, slot)
    assert first == {"tinker_path": f"tinker://{slot['session_id']}:train:3/sampler_weights/b"}
    assert copied(rig, slot) == first
    other = rig.post("copy_weights", {**slot, "ttl_seconds": 3600})
    assert (other.status_code, other.json()["error"]) == (400, "sequence_conflict")
    by_key = {"source_path": path, "destination_project_id": "p"}
    keyed = [copied(rig, by_key, key=key) for key in ("k", "k", "l")]
    assert keyed[0] == keyed[1] != keyed[2]


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({}, 400, "destination_project_id"),
        ({"session_id": "s"}, 400, "model_seq_id"),
        ({"session_id": "s", "model_seq_id": 1}, 404, "session_id"),
        ({"session_id": "s", "model_seq_id": 1, "destination_project_id": "p"}, 400, "destination_project_id"),
        ({"destination_project_id": "p", "ttl_seconds": 3599}, 400, "ttl_seconds"),
        ({"destination_project_id": "p", "weights_access_token": "t"}, 400, "weights_access_token"),
        ({"destination_project_id": "p", "source_path": "tinker://m/weights/none"}, 404, "source_path"),
        ({"destination_project_id": "p", "source_path": "tinker://m/else/a"}, 400, "source_path"),
        ({"destination_project_id": "p", "source_path": "tinker://m/weights/.."}, 404, "checkpoint"),
    ],
)
def test_a_copy_that_is_wrong_is_refused_by_name(
    training: tinker.TrainingClient, rig: Rig, fields: dict[str, object], status: int, word: str
) -> None:
    path = training.save_state("a").result().path
    answer = rig.post("copy_weights", {"source_path": path, **fields})
    assert (answer.status_code, word in answer.json()["detail"]) == (status, True), answer.text


def test_a_sampler_ends_with_its_deleted_checkpoint(
    sdk: tinker.ServiceClient, rest: RestClient, training: tinker.TrainingClient
) -> None:
    path = training.save_weights_for_sampler("gone").result().path
    sampler = sdk.create_sampling_client(model_path=path)
    ask = (types.ModelInput.from_ints([1, 2]), 1, types.SamplingParams(max_tokens=2))
    assert len(sampler.sample(*ask).result().sequences) == 1
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError, match="was deleted"):
        sampler.sample(*ask).result()
