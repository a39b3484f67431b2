"""The ranks' meeting place goes with its process."""

import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gradstream.worker.meeting import meeting_place

_HOLD = (
    "import sys, time\n"
    "from gradstream.worker.meeting import meeting_place\n"
    "with meeting_place() as folder:\n"
    "    print(folder, flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_is_private_and_gone_afterwards(parent: Path) -> None:
    with meeting_place() as folder:
        assert folder.parent == parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "ranks").write_text("1")
    assert not list(parent.iterdir())


def test_the_one_of_a_killed_process_is_removed_by_the_next_and_those_of_the_living_are_left(parent: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            other = Path(process.stdout.readline().strip())
            with meeting_place() as mine:
                assert set(parent.iterdir()) == {other, mine}
        finally:
            process.send_signal(signal.SIGKILL)
    assert other.exists()
    with meeting_place() as mine:
        assert set(parent.iterdir()) == {mine}


def test_what_has_no_lock_or_is_a_link_is_left_alone(parent: Path) -> None:
    elsewhere = parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("")
    (parent / "gradstream-ranks-link").symlink_to(elsewhere)
    (parent / "gradstream-ranks-other").mkdir()
    with meeting_place():
        pass
    assert {path.name for path in parent.iterdir()} == {"elsewhere", "gradstream-ranks-link", "gradstream-ranks-other"}
    assert (elsewhere / "lock").exists()
