"""The bench runs to its end and writes every figure; how large they are is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.e2e
def test_the_bench_measures_server_and_bare_job_and_writes_them_as_json(tmp_path):
    target = tmp_path / "run.json"
    sizes = ["--rounds", "1", "--steps", "2", "--clients", "1", "2"]

    subprocess.run([sys.executable, "-m", "bench.latency", *sizes, "--json", str(target)], cwd=REPOSITORY, check=True)

    run = json.loads(target.read_text(encoding="utf-8"))
    assert run["forward_backward"]["num"] == run["bare_forward_backward"]["num"] == 2
    assert [item["clients"] for item in run["throughput"]] == [1, 2]
    assert run["machine"]["packages"]["tinker"]
