"""A gang that stands still inside a save and wakes up after its successor took over changes nothing that lies on disk."""

from pathlib import Path

import pytest
import torch
from tests.support.adapters import CPU, noisy_adapter, save_adapter
from tests.support.saved import write_save

from gradstream.engine import files
from gradstream.engine.checkpoint.copy import CopyOrder, copy_checkpoint
from gradstream.engine.checkpoint.drafts import FOLDER, Drafts, newest_drafts
from gradstream.engine.checkpoint.location import Checkpoint, CheckpointKind, checkpoint, parse_uri
from gradstream.engine.checkpoint.manifest import read_manifest
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.files import Revoked, whole_directory
from gradstream.engine.models.build import load_base
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId
from gradstream.shared.wire import LoraSpec

URI = "tinker://s:train:0/weights/a"
PLACE = checkpoint(ModelId("s:train:0"), CheckpointKind.WEIGHTS, "a")


@pytest.fixture(scope="module")
def adapter():
    base = load_base(Path("tests/models/tiny-qwen3-shakespeare"), device=CPU, dtype=torch.float32)
    return noisy_adapter(base, spec=LoraSpec(rank=2, seed=3))


def gang(output_dir, epoch):
    drafts = Drafts(output_dir, engine="main", epoch=epoch)
    drafts.take()
    return drafts


def save(adapter, output_dir, drafts, *, job):
    order = SaveOrder(location=PLACE, job=FutureId(job), base_model="tiny", overwrite=True)
    return save_adapter(adapter, order, output_dir, drafts=drafts)


def job_of(output_dir):
    return read_manifest(PLACE.directory(output_dir), source=URI).job


def asleep_before(monkeypatch, name, meanwhile):
    """Let meanwhile happen once, at the moment when files.`name` is called for the first time."""
    real, pending = getattr(files, name), [meanwhile]

    def late(*args, **options):
        if pending:
            pending.pop()()
        return real(*args, **options)

    monkeypatch.setattr(files, name, late)


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange in one step", "two renames"])
@pytest.mark.parametrize("instant", ["_settle", "_publish", "_swap"])
def test_a_sleeper_does_not_replace_its_successors_save(adapter, tmp_path, monkeypatch, instant, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    first = gang(tmp_path, 5)
    save(adapter, tmp_path, first, job="j1")

    def successor():
        second = gang(tmp_path, 6)
        # The job that the sleeper was busy with, and the next one of its name.
        save(adapter, tmp_path, second, job="j2")
        save(adapter, tmp_path, second, job="j3")

    asleep_before(monkeypatch, instant, successor)
    with pytest.raises(Revoked, match="another gang has taken over"):
        save(adapter, tmp_path, first, job="j2")
    assert job_of(tmp_path) == "j3"
    assert [path.name for path in PLACE.directory(tmp_path).parent.iterdir()] == ["a"]


def test_a_sleeper_does_not_bring_back_what_was_deleted_meanwhile(adapter, tmp_path, monkeypatch):
    first = gang(tmp_path, 5)
    asleep_before(monkeypatch, "_publish", lambda: gang(tmp_path, 6))
    with pytest.raises(Revoked):
        save(adapter, tmp_path, first, job="j1")
    assert not PLACE.directory(tmp_path).exists()


def test_a_sleeper_does_not_begin_a_save(adapter, tmp_path):
    first = gang(tmp_path, 5)
    gang(tmp_path, 6)
    with pytest.raises(Revoked):
        save(adapter, tmp_path, first, job="j1")
    assert not PLACE.directory(tmp_path).exists()


def test_a_sleeper_does_not_finish_a_copy(tmp_path, monkeypatch):
    write_save(tmp_path, "tinker://old:train:0/weights/a", created_ms=1)
    source = parse_uri("tinker://old:train:0/weights/a")
    assert isinstance(source, Checkpoint)
    first = gang(tmp_path, 5)
    order = CopyOrder(source=source, target=PLACE, job=FutureId("j"), tenant=LOCAL_TENANT)
    asleep_before(monkeypatch, "_publish", lambda: gang(tmp_path, 6))
    with pytest.raises(Revoked):
        copy_checkpoint(order, tmp_path, drafts=first)
    assert not PLACE.directory(tmp_path).exists()


def test_a_save_of_the_gang_that_leads_leaves_no_draft(adapter, tmp_path):
    drafts = gang(tmp_path, 5)
    save(adapter, tmp_path, drafts, job="j1")
    save(adapter, tmp_path, drafts, job="j2")
    assert job_of(tmp_path) == "j2"
    assert list(drafts.folder(PLACE.directory(tmp_path)).iterdir()) == []


def test_what_a_killed_gang_left_is_gone_when_the_next_one_takes_over(tmp_path):
    target = PLACE.directory(tmp_path)
    folder = gang(tmp_path, 5).folder(target)
    (folder / ".a.x.tmp").mkdir()
    (folder / ".a.x.tmp" / "weights").write_bytes(b"half")
    gang(tmp_path, 6)
    assert [path.name for path in folder.parent.iterdir()] == ["00000006"]


def test_a_gang_that_was_overtaken_before_it_had_a_place_gets_none(tmp_path):
    gang(tmp_path, 6)
    with pytest.raises(Revoked, match="epoch 6 has begun after epoch 5"):
        gang(tmp_path, 5)
    assert newest_drafts(tmp_path, engine="main") == 6


def test_engines_in_one_output_directory_do_not_take_each_others_place(tmp_path):
    other = Drafts(tmp_path, engine="other", epoch=1)
    other.take()
    gang(tmp_path, 6)
    with whole_directory(PLACE.directory(tmp_path), draft_in=other.folder(PLACE.directory(tmp_path))) as draft:
        (draft / "file").write_text("x")
    assert PLACE.directory(tmp_path).is_dir()
    assert newest_drafts(tmp_path, engine="other") == 1


def test_taking_the_same_place_twice_keeps_it(tmp_path):
    drafts = gang(tmp_path, 5)
    drafts.take()
    assert newest_drafts(tmp_path, engine="main") == 5
    assert (tmp_path / "checkpoints" / FOLDER / "main" / "00000005").is_dir()
