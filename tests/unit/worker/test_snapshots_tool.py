"""`gradstream snapshots` on a real store: it says what the engine's own reader says, and finds what is damaged."""

import hashlib
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.support.disklog import batch, future, open_writer
from tests.support.snapshots import head, model_state
from typer.testing import CliRunner

from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.worker.cli import app
from gradstream.worker.inspect.snapshot_rows import SnapshotRow

RUNNER = CliRunner()


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    """Two snapshots: the second writes one of two models anew."""
    store = SnapshotStore(tmp_path / "snapshots" / "main")
    store.write(head(1), [model_state("a", seed=1), model_state("b", seed=2)], live={"a", "b"})
    store.write(head(3), [model_state("b", seed=5, has_grad=True, tenant="other")], live={"a", "b"})
    return store


def run(tmp_path: Path, *arguments: str, status: int = 0) -> str:
    result = RUNNER.invoke(app, ["snapshots", "--output-dir", str(tmp_path), *arguments])
    assert result.exit_code == status, result.output
    return result.output


def rows(tmp_path: Path, *arguments: str, status: int = 0) -> list[SnapshotRow]:
    result = RUNNER.invoke(app, ["snapshots", "--output-dir", str(tmp_path), "--json", *arguments])
    assert result.exit_code == status, result.output
    return msgspec.json.decode(result.stdout, type=list[SnapshotRow])


def test_the_tool_says_what_the_engines_reader_says(store: SnapshotStore, tmp_path: Path):
    listed = rows(tmp_path)
    for row, cut in zip(listed, store.cuts(), strict=True):
        assert row.batch == f"{cut.head.epoch}-{cut.head.number}"
        assert row.size_bytes == cut.size_bytes
        assert (row.cursor, row.log_segment, row.log_offset) == (
            cut.head.cursor,
            cut.head.log_segment,
            cut.head.log_offset,
        )
        assert row.fingerprint == cut.head.fingerprint
        assert {one.model: (one.step, one.has_grad, one.tenant, one.kind, one.directory) for one in row.models} == {
            model: (entry.step, entry.has_grad, entry.tenant, entry.kind, entry.directory)
            for model, entry in cut.models.items()
        }


@pytest.mark.usefixtures("store")
def test_what_a_snapshot_wrote_is_told_from_what_it_shares(tmp_path: Path):
    newest, first = rows(tmp_path)
    assert {one.model: one.is_own for one in newest.models} == {"a": False, "b": True}
    assert newest.own_bytes == next(one.size_bytes for one in newest.models if one.is_own)
    assert first.own_bytes == first.size_bytes


def test_sound_snapshots_pass_and_a_changed_file_is_named_with_status_1(store: SnapshotStore, tmp_path: Path):
    assert [row.is_valid for row in rows(tmp_path)] == [None, None]
    assert [row.is_valid for row in rows(tmp_path, "--verify")] == [True, True]
    cut = store.find((1, 3))
    entry = cut.models["b"]
    (name,) = entry.files
    path = store.directory / entry.directory / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    newest, first = rows(tmp_path, "--verify", status=1)
    assert (newest.is_valid, first.is_valid) == (False, True)
    assert newest.problem is not None
    assert f"model b: {name} does not have the digest" in newest.problem
    assert "NO" in run(tmp_path, "--verify", status=1)


@pytest.mark.usefixtures("store")
def test_a_snapshot_at_a_batch_that_the_log_does_not_have_is_void(tmp_path: Path):
    writer = open_writer(tmp_path / "joblog" / "main")
    writer.append_batch(batch(1, [future(1)]))
    writer.close()
    newest, first = rows(tmp_path, "--verify", status=1)
    assert (newest.is_valid, first.is_valid) == (False, True)
    assert newest.problem == "batch 1-3 is not one of the log: a gang that had lost its lease made it"


def test_a_cut_whose_text_was_changed_is_damaged_and_the_others_are_listed(store: SnapshotStore, tmp_path: Path):
    path = max((store.directory / "cuts").iterdir())
    path.write_text(path.read_text().replace('"step": 5', '"step": 6'))
    newest, first = rows(tmp_path, status=1)
    assert (newest.batch, newest.is_valid) == ("1-3", False)
    assert newest.problem == f"snapshot {path} is damaged: it does not have its own digest"
    assert len(first.models) == 2


def test_a_path_out_of_the_store_is_refused(store: SnapshotStore, tmp_path: Path):
    path = max((store.directory / "cuts").iterdir())
    file = msgspec.json.decode(path.read_bytes())
    for directory in ("../../etc", "/etc", "models/b", "cuts/b/00000001-0000000003"):
        file["cut"]["models"]["b"]["directory"] = directory
        text = msgspec.json.encode(file["cut"])
        file["sha256"] = hashlib.sha256(text).hexdigest()
        path.write_bytes(msgspec.json.encode(file))
        problem = f"snapshot {path}: the paths of model b are not those of a snapshot"
        assert rows(tmp_path, status=1)[0].problem == problem


@pytest.mark.usefixtures("store")
def test_only_snapshots_with_a_model_can_be_asked_for(tmp_path: Path):
    assert len(rows(tmp_path, "--model", "a")) == 2
    assert run(tmp_path, "--model", "c", status=2) == "error: --model: no snapshot holds c; they hold a, b\n"
    text = run(tmp_path, "--engine", "other", status=2)
    assert "there are no snapshots" in text
    assert text.endswith("there are some of the engine(s) main: give --engine\n")


def test_snapshots_are_listed_without_torch(store: SnapshotStore):
    code = (
        "import sys; from pathlib import Path; import gradstream.worker.cli; "
        "from gradstream.worker.inspect.snapshot_rows import snapshot_rows; "
        f"print(len(snapshot_rows(Path({str(store.directory)!r}), verify=True)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
