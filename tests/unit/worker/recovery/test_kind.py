"""A server that could only lose the models of its output_dir does not start."""

import pytest

from gradstream.engine.snapshot.cut import Cut, CutHead
from gradstream.shared.errors import Unsupported
from gradstream.worker.recovery.kind import check_kind
from gradstream.worker.recovery.past import Past

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
