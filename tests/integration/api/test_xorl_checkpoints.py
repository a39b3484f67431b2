"""Checkpoints of xorl clients: saved in order, shown by the client's names, loaded by any spelling."""

import pytest
from tests.support.rig import Rig
from tests.support.xorl import Xorl

from gradstream.shared.joblog.port import RecordKind


@pytest.fixture
def xorl(rig: Rig) -> Xorl:
    return Xorl(rig)


def test_a_save_without_a_name_takes_one_from_the_time(xorl: Xorl) -> None:
    path = xorl.done("save_weights", model_id="default", path=None)["path"]
    assert path.startswith("xorl://default/weights/checkpoint-")
    assert path.rpartition("-")[2].isdecimal()


def test_a_repeated_save_without_a_name_is_one_save(xorl: Xorl) -> None:
    bodies = [xorl.ok("save_weights", model_id="default", seq_id=1, path=None) for _ in range(2)]
    assert bodies[0] == bodies[1]


def test_saves_and_loads_run_where_the_client_put_them(xorl: Xorl) -> None:
    model = xorl.make("policy")
    answers = [
        xorl.post("optim_step", model_id=model, seq_id=1, adam_params={"learning_rate": 1e-4}),
        xorl.post("save_weights", model_id=model, seq_id=2, path="one"),
        xorl.post("optim_step", model_id=model, seq_id=3, adam_params={"learning_rate": 1e-4}),
        xorl.post("load_weights", model_id=model, seq_id=4, path="one", optimizer=False),
    ]
    results = [xorl.outcome(answer) for answer in answers]
    assert results[1]["path"] == results[3]["path"] == "xorl://policy/weights/one"
    ops = [op for owner, _, op in xorl.rig.worker.seen if owner == model]
    assert ops == ["create_model", "optim_step", "save_weights", "optim_step", "load_weights"]


@pytest.mark.parametrize("field", ["name", "path"])
def test_weights_for_a_sampler_are_named_in_either_field(xorl: Xorl, field: str) -> None:
    saved = xorl.done("save_weights_for_sampler", model_id="default", **{field: "step-1"})
    assert saved["path"] == "xorl://default/sampler_weights/step-1"


@pytest.mark.parametrize("fields", [{}, {"name": "a", "path": "b"}, {"name": "a/b"}, {"path": ".."}])
def test_a_save_for_a_sampler_needs_one_good_name(xorl: Xorl, fields: dict[str, str]) -> None:
    assert xorl.post("save_weights_for_sampler", model_id="default", **fields).status_code == 400


@pytest.mark.parametrize(
    ("call", "fields", "expected"),
    [
        ("save_weights", {"path": "a/b"}, "path: 'a/b' cannot name a checkpoint"),
        ("save_weights", {"path": "x", "save_optimizer": False}, "save_optimizer: checkpoints always hold"),
        ("load_weights", {"path": "/etc/passwd"}, "path: '/etc/passwd' does not name a checkpoint"),
        ("load_weights", {"path": "xorl://default/sampler_weights/x"}, "of kind 'sampler_weights'"),
        ("load_weights", {"path": "x", "optimizer": True, "load_optimizer": False}, "they mean the same and differ"),
        ("load_weights", {}, "path: Field required"),
    ],
)
def test_a_request_that_is_wrong_is_refused_and_says_where(
    xorl: Xorl, call: str, fields: dict[str, object], expected: str
) -> None:
    refused = xorl.post(call, model_id="default", **fields)
    assert refused.status_code == 400
    assert expected in refused.json()["detail"]


def test_a_save_beyond_the_disk_fails_as_507(xorl: Xorl) -> None:
    failed = xorl.outcome(xorl.post("save_weights", model_id="default", path="too-large"))
    assert failed["category"] == "server"
    assert failed["code"] == "storage_limit"
    assert failed["error"].startswith("507: ")


def test_a_model_lists_its_own_checkpoints_newest_first(xorl: Xorl) -> None:
    for model in ("policy", "other"):
        xorl.make(model)
        xorl.done("save_weights", model_id=model, path="one")
        xorl.done("save_weights_for_sampler", model_id=model, name="two")
    listed = xorl.ok("list_checkpoints", model_id="policy")["checkpoints"]
    assert [(one["checkpoint_id"], one["checkpoint_type"], one["path"]) for one in listed] == [
        ("sampler_weights/two", "sampler", "xorl://policy/sampler_weights/two"),
        ("weights/one", "training", "xorl://policy/weights/one"),
    ]
    assert all(one["size_bytes"] > 0 and one["time"] for one in listed)


def test_the_model_that_needs_no_making_has_no_checkpoints_before_its_first_use(xorl: Xorl) -> None:
    assert xorl.ok("list_checkpoints") == {"checkpoints": []}
    assert xorl.post("list_checkpoints", model_id="nobody").status_code == 404


@pytest.mark.parametrize("form", ["weights/one", "weights/default/one", "xorl://default/weights/one"])
def test_a_deleted_checkpoint_is_gone_by_whichever_id(xorl: Xorl, form: str) -> None:
    xorl.done("save_weights", model_id="default", path="one")
    deleted = xorl.ok("delete_checkpoint", model_id="default", checkpoint_id=form)
    assert deleted == {"success": True, "deleted_path": "xorl://default/weights/one", "error": None}
    assert xorl.ok("list_checkpoints")["checkpoints"] == []
    again = xorl.post("delete_checkpoint", model_id="default", checkpoint_id=form)
    assert again.status_code == 404
    assert "xorl://default/weights/one" in again.json()["detail"]


def test_the_checkpoint_that_a_model_began_with_stays(xorl: Xorl) -> None:
    xorl.done("save_weights", model_id="default", path="000000")
    refused = xorl.post("delete_checkpoint", model_id="default", checkpoint_id="weights/000000")
    assert refused.status_code == 403
    assert "xorl://default/weights/000000 is the checkpoint that its model began with" in refused.json()["detail"]
    assert len(xorl.ok("list_checkpoints")["checkpoints"]) == 1


def test_it_stays_for_clients_of_the_other_api_too(xorl: Xorl) -> None:
    xorl.done("save_weights", model_id="default", path="000000")
    path = "/api/v1/training_runs/default/checkpoints/weights/000000"
    for refused in (xorl.rig.http.delete(path), xorl.rig.http.put(f"{path}/ttl", json={"ttl_seconds": 3600})):
        assert refused.status_code == 403
        assert "is the checkpoint that its model began with" in refused.json()["detail"]
    assert xorl.rig.http.put(f"{path}/ttl", json={"ttl_seconds": None}).status_code == 204
    assert len(xorl.ok("list_checkpoints")["checkpoints"]) == 1


def test_weights_info_tells_what_a_model_must_be_made_with(xorl: Xorl) -> None:
    xorl.done("save_weights", model_id="default", path="one")
    info = xorl.ok("weights_info", xorl_path="xorl://default/weights/one")
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == ("tests/uniform", True, 8)
    assert xorl.post("weights_info", xorl_path="xorl://default/weights/none").status_code == 404
    assert xorl.post("weights_info", xorl_path="a/b/c/d").status_code == 400
    assert xorl.post("weights_info", model_id="default").status_code == 400


def test_training_runs_can_be_read_by_clients_of_both_dialects(xorl: Xorl) -> None:
    model = xorl.make("policy")
    xorl.done("save_weights", model_id=model, path="one")
    listed = xorl.rig.ok(xorl.rig.http.get("/api/v1/training_runs?limit=5&offset=0"))
    [run] = listed["training_runs"]
    assert listed["cursor"] == {"offset": 0, "limit": 5, "total_count": 1}
    assert (run["training_run_id"], run["is_lora"], run["lora_rank"]) == ("policy", True, 8)
    assert run["last_checkpoint"]["path"] == "xorl://policy/weights/one"
    assert run["last_checkpoint"]["tinker_path"] == "tinker://policy/weights/one"
    assert xorl.rig.ok(xorl.rig.http.get("/api/v1/training_runs/policy"))["training_run_id"] == "policy"


def test_runs_of_full_weights_say_so(xorl: Xorl, redis_url: str, engine_name: str) -> None:
    from gradstream.shared.joblog.census import RedisCensus

    xorl.make("policy")
    with RedisCensus(redis_url, engine=engine_name) as census:
        census.change(RecordKind.MODEL, "policy", {"rank": ""})
    [run] = xorl.rig.ok(xorl.rig.http.get("/api/v1/training_runs"))["training_runs"]
    assert (run["is_lora"], run["lora_rank"]) == (False, None)
