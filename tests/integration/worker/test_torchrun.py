"""A gang under torchrun of which one rank fails."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e]

_RANK = """
import os, signal, sys, time
from pathlib import Path

folder = Path(os.environ["SCRIPT_FOLDER"])
if os.environ["RANK"] == "0":
    while not (folder / "deaf").exists():
        time.sleep(0.05)
    (folder / "failed").touch()
    sys.exit(70)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / "deaf").touch()
while True:
    (folder / "alive").touch()
    time.sleep(0.05)
"""


def test_a_rank_that_does_not_hear_is_killed_soon_after_another_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPT_FOLDER", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    command = [sys.executable, "-m", "gradstream.worker.torchrun", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--max-restarts", "0", str(script)]
    ended = subprocess.run(command, check=False, capture_output=True, timeout=500)
    assert ended.returncode == 70, ended.stderr.decode()
    # torchrun by itself waits 30 s.
    assert (tmp_path / "alive").stat().st_mtime - (tmp_path / "failed").stat().st_mtime < 25
    assert not list(tmp_path.glob("*gradstream-ranks-*"))
