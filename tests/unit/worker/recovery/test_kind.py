"""A server that could only lose the models of its output_dir does not start."""

import pytest
from tests.support.worker_jobs import job

from gradstream.engine.snapshot.cut import Cut, CutHead
from gradstream.shared.errors import Unsupported
from gradstream.shared.joblog.port import BatchId, Ended
from gradstream.shared.wire import OptimStepDone, Plan
from gradstream.worker.recovery.kind import check_kind, check_meaning
from gradstream.worker.recovery.past import Past
from gradstream.worker.recovery.replay import PastBatch

LORA = "torch=2 model=aa ranks=1"
FULL = "torch=2 model=aa ranks=1 weights=full"


def cut(fingerprint: str, *models: str) -> Cut:
    head = CutHead(
        epoch=1,
        number=1,
        cursor="0-0",
        log_segment=1,
        log_offset=0,
        fingerprint=fingerprint,
        engine="main",
        created_ms=0,
    )
    # What a model's entry says is not looked at.
    return Cut(head=head, models=dict.fromkeys(models))  # type: ignore[arg-type]


def refusal(before: Cut, now: str, *, state: str = "ready") -> str:
    with pytest.raises(Unsupported) as caught:
        check_kind(before, Past(is_whole=True), now, state_of=lambda _model: state)
    return caught.value.message


def test_the_refusal_names_the_models_and_what_differs():
    assert "2 models (the first is a) that this config cannot serve: they are LoRA adapters" in refusal(
        cut(LORA, "b", "a"), FULL
    )
    assert "1 model (the first is default) that this config cannot serve: they are of full weights" in refusal(
        cut(FULL, "default"), LORA
    )
    assert "they are of another base model" in refusal(cut(LORA, "a"), "torch=2 model=bb ranks=1")


@pytest.mark.parametrize("state", ["lost", "failed", "unloaded"])
def test_models_that_have_nothing_to_lose_stop_no_start(state):
    check_kind(cut(LORA, "a"), Past(is_whole=True), FULL, state_of=lambda _model: state)


@pytest.mark.parametrize(
    ("before", "now"), [(cut(LORA), FULL), (cut(LORA, "a"), LORA), (cut(LORA, "a"), "torch=3 model=aa ranks=2")]
)
def test_an_empty_snapshot_and_other_changes_stop_no_start(before, now):
    check_kind(before, Past(is_whole=True), now, state_of=lambda _model: "ready")


def past_batch(kind: str, fingerprint: str) -> PastBatch:
    one = job("s1:train:0", 1, kind)
    plan = Plan(kind=kind, future_ids=[one.future_id], row_budget_tokens=1)
    ended = Ended.of(one, OptimStepDone(metrics={}))
    return PastBatch(batch=BatchId(1, 1), plan=plan, ended=[ended], sources={}, fingerprint=fingerprint)


@pytest.mark.parametrize(
    ("kind", "before", "now", "told"),
    [
        ("create_model", "lora_alpha=32.0 seed=1", "lora_alpha=1.0 seed=1", "lora_alpha was 32.0 and is 1.0."),
        ("reset_model", "seed=1", "seed=2 modules=q_proj", "lora_target_modules was not set and is q_proj, seed was 1 and is 2."),
        ("optim_step", 'schedule={"total_steps":9}', "torch=2", 'lr_schedule was {"total_steps":9} and is not set.'),
    ],
)  # fmt: skip
def test_jobs_that_would_be_others_are_not_run_again(kind, before, now, told):
    with pytest.raises(Unsupported) as caught:
        check_meaning([past_batch(kind, before)], now, state_of=lambda _model: "ready")
    assert f"jobs of s1:train:0 must run again, and they ran under another config: {told}" in caught.value.message


@pytest.mark.parametrize(
    ("kind", "before", "now", "state"),
    [
        pytest.param("optim_step", "lora_alpha=32.0", "lora_alpha=1.0", "ready", id="of a model that is made"),
        pytest.param("create_model", "threads=1", "threads=2", "ready", id="bits"),
        pytest.param("create_model", "", "lora_alpha=1.0", "ready", id="not known"),
        pytest.param("create_model", "lora_alpha=32.0", "lora_alpha=1.0", "lost", id="lost before"),
        pytest.param("save_weights", "merging=a", "merging=b", "ready", id="changes no state"),
    ],
)
def test_jobs_that_mean_the_same_are_run_again(kind, before, now, state):
    check_meaning([past_batch(kind, before)], now, state_of=lambda _model: state)
