"""What executed jobs change in records."""

import msgspec
import pytest
from tests.support.worker_jobs import job

from gradstream.engine.checkpoint.manifest import FileEntry, Manifest
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import (
    CreateModelDone,
    Failed,
    ForwardBackwardDone,
    LoadWeightsDone,
    LoraSpec,
    OptimizerSpec,
    OptimStepDone,
    SaveExternalDone,
    SaveForSamplerDone,
    SaveWeightsDone,
    UnloadModelDone,
)
from gradstream.worker.records import Executed, record_context, record_writes, saved_uri

MODEL = "s:train:1"
URI = f"tinker://{MODEL}/weights/first"
MANIFEST = Manifest(
    version=1,
    kind="weights",
    source=URI,
    model=MODEL,
    job=f"{MODEL}:4",
    tenant="local",
    base_model="tiny",
    lora=LoraSpec(rank=8, seed=5, train_mlp=False),
    scale=4.0,
    step=3,
    has_optimizer=True,
    created_ms=1_000,
    files={"a": FileEntry(size_bytes=7, sha256="00"), "b": FileEntry(size_bytes=5, sha256="11")},
    ttl_seconds=60,
    user_metadata={"renderer_name": "role_colon"},
)
FAILED = Failed(code="server_error", category="server", message="no memory")


def writes(op, outcome, *, seq=4, manifest=None):
    executed = Executed(job=job(MODEL, seq, op), outcome=outcome, manifest=manifest)
    return {(write.kind, write.record_id): dict(write.fields) for write in record_writes(executed)}


@pytest.mark.parametrize(
    ("op", "outcome", "fields"),
    [
        ("create_model", CreateModelDone(model_id=MODEL), {"state": "ready"}),
        ("load_weights", LoadWeightsDone(path=URI, model_id=MODEL), {"state": "ready"}),
        ("create_model", FAILED, {"state": "failed", "error": "no memory"}),
        ("load_weights", FAILED, {"state": "failed", "error": "no memory"}),
    ],
)
def test_the_job_that_makes_a_model_decides_its_state(op, outcome, fields):
    assert writes(op, outcome, seq=0) == {(RecordKind.MODEL, MODEL): fields}


def test_a_model_that_is_made_again_later_in_its_order_has_its_state_from_that_job():
    made = writes("create_model", CreateModelDone(model_id=MODEL), seq=7)
    assert made == {(RecordKind.MODEL, MODEL): {"state": "ready"}}
    assert writes("load_weights", LoadWeightsDone(path=URI, model_id=MODEL), seq=7) == {}


@pytest.mark.parametrize(
    ("op", "outcome"),
    [
        ("load_weights", LoadWeightsDone(path=URI, model_id=MODEL)),
        ("load_weights", FAILED),
        ("forward_backward", ForwardBackwardDone(outputs={}, metrics={})),
        ("optim_step", OptimStepDone(metrics={})),
        ("save_weights", FAILED),
    ],
)
def test_other_jobs_leave_every_record_alone(op, outcome):
    assert writes(op, outcome) == {}


def test_what_moves_with_a_models_jobs_is_no_part_of_the_record_it_was_made_with():
    moving = (
        "tail",
        "made_at",
        "ended_at",
        "turned_ms",
        "recorded_at",
        "kill",
        "idle",
        "next_seq",
        "next_seq:3",
        "state",
    )
    made = {"tenant": "local", "session": "default", "rank": "8", "spec": "second", "created_ms": "5"}
    (write,) = record_context(job(MODEL, 2, "create_model"), {**made, **dict.fromkeys(moving, "1")}, None)
    assert write.fields == made


def test_an_unloaded_model_is_recorded_as_such():
    assert writes("unload_model", UnloadModelDone(model_id=MODEL)) == {(RecordKind.MODEL, MODEL): {"state": "unloaded"}}


def test_a_save_records_the_checkpoint_and_names_it_on_its_model():
    found = writes("save_weights", SaveWeightsDone(path=URI), manifest=MANIFEST)
    assert found[RecordKind.MODEL, MODEL] == {"last_checkpoint": URI}
    assert found[RecordKind.CHECKPOINT, URI] == {
        "tenant": "local",
        "model": MODEL,
        "kind": "weights",
        "base_model": "tiny",
        "rank": "8",
        "alpha": "32.0",
        "seed": "5",
        "train_attn": "1",
        "train_mlp": "0",
        "train_unembed": "1",
        "optimizer": "{}",
        "step": "3",
        "has_optimizer": "1",
        "created_ms": "1000",
        "expires_ms": "61000",
        "size_bytes": "12",
        "user_metadata": '{"renderer_name": "role_colon"}',
        "directory": "checkpoints/s+train+1/weights/first",
        "files": '{"a": 7, "b": 5}',
    }


def test_the_record_of_full_weights_has_no_adapter():
    manifest = msgspec.structs.replace(MANIFEST, lora=None, optimizer=OptimizerSpec(type="muon"))
    found = writes("save_weights", SaveWeightsDone(path=URI), manifest=manifest)[RecordKind.CHECKPOINT, URI]
    assert {found[name] for name in ("rank", "alpha", "seed", "train_attn", "train_mlp", "train_unembed")} == {""}
    assert found["optimizer"] == '{"type":"muon"}'


def test_a_named_sampler_checkpoint_is_no_place_to_resume_training_from():
    path = f"tinker://{MODEL}/sampler_weights/first"
    found = writes("save_weights_for_sampler", SaveForSamplerDone(path=path), manifest=MANIFEST)
    assert found[RecordKind.MODEL, MODEL] == {"last_sampler_checkpoint": path}
    assert (RecordKind.CHECKPOINT, path) in found


def test_an_ephemeral_save_records_its_sampler_with_the_path_that_samples_carry():
    outcome = SaveForSamplerDone(sampler_id="s:sample:2")
    found = writes("save_weights_for_sampler", outcome, manifest=MANIFEST)
    fields = found[RecordKind.SAMPLER, "s:sample:2"]
    assert fields["model_path"] == saved_uri(outcome) == "tinker://samplers/s:sample:2"
    assert (fields["tenant"], fields["base_model"]) == ("local", "tiny")


def test_an_external_save_is_recorded_beside_the_others():
    path = f"tinker://{MODEL}/external_weights/out"
    found = writes("save_weights_external", SaveExternalDone(path=path, size_bytes=12), manifest=MANIFEST)
    assert found.keys() == {(RecordKind.CHECKPOINT, path)}
