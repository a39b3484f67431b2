"""A save whose commit never came does not keep its name; any other one does."""

import pytest
from tests.support.saved import write_save
from tests.support.worker_jobs import job

from gradstream.shared import codec
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import AdamParams, OptimStep, SaveExternal, SaveForSampler, SaveWeights
from gradstream.worker.orphans import free_names
from gradstream.worker.storage import Storage

SAVES = {
    "weights": ("save_weights", SaveWeights(name="a")),
    "sampler_weights": ("save_weights_for_sampler", SaveForSampler(name="a", session_id="s")),
    "external_weights": ("save_weights_external", SaveExternal(name="a")),
}


def freed(root, one, *, records=(), scanned=True, settled=None):
    known = {(RecordKind.CHECKPOINT, uri) for uri in records} | (
        {(RecordKind.STORAGE, ".scanned")} if scanned else set()
    )
    return free_names(
        [one],
        storage=Storage(root),
        recorded=lambda kind, name: {} if (kind, name) in known else None,
        settle=lambda: settled.append(1) if settled is not None else None,
    )


def saving(op, payload, *, seq=7, tenant="local"):
    return job("s:train:0", seq, op, payload=codec.encode(payload), tenant=tenant)


@pytest.mark.parametrize("kind", SAVES)
def test_the_save_of_another_job_that_no_record_knows_is_removed(tmp_path, kind):
    uri = f"tinker://s:train:0/{kind}/a"
    write_save(tmp_path, uri, created_ms=1)
    settled = []
    assert freed(tmp_path, saving(*SAVES[kind]), settled=settled) == [uri]
    assert settled == [1]
    assert list(Storage(tmp_path).checkpoints()) == []


@pytest.mark.parametrize(
    ("one", "options"),
    [
        pytest.param(saving(*SAVES["weights"]), {"records": ["tinker://s:train:0/weights/a"]}, id="recorded"),
        pytest.param(saving(*SAVES["weights"]), {"scanned": False}, id="records are lost"),
        pytest.param(saving(*SAVES["weights"], seq=1), {}, id="the same job"),
        pytest.param(saving(*SAVES["weights"], tenant="other"), {}, id="another tenant"),
        pytest.param(saving("save_weights", SaveWeights(name="a", overwrite=True)), {}, id="overwrites"),
        pytest.param(saving("save_weights", SaveWeights(name="b")), {}, id="another name"),
        pytest.param(saving("save_weights", SaveWeights(name="../a")), {}, id="no name"),
        pytest.param(saving("optim_step", OptimStep(adam=AdamParams(learning_rate=1e-3))), {}, id="saves nothing"),
    ],
)
def test_any_other_save_stays(tmp_path, one, options):
    write_save(tmp_path, "tinker://s:train:0/weights/a", created_ms=1)
    assert freed(tmp_path, one, **options) == []
    assert len(list(Storage(tmp_path).checkpoints())) == 1


def test_nothing_is_removed_by_a_gang_that_was_replaced(tmp_path):
    write_save(tmp_path, "tinker://s:train:0/weights/a", created_ms=1)

    def fenced():
        raise RuntimeError("fenced")

    with pytest.raises(RuntimeError):
        free_names([saving(*SAVES["weights"])], storage=Storage(tmp_path), recorded=lambda *_: {}, settle=fenced)
    assert len(list(Storage(tmp_path).checkpoints())) == 1
