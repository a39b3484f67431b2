"""Stock clients as child processes: each in its own environment, against one server."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.client_envs import is_ready, python_of

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent.parent
NEWEST = "tinker-0.38.0"
OLDER = ("tinker-0.24.1", "tinker-0.16.1")
XORL = "xorl-client-0.1.0"
API_KEY = "tml-contract"


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A client's environment, the folder its processes run in, and the server they talk to."""

    name: str
    folder: Path
    url: str

    def run(self, *words: str, timeout_s: float = 300.0) -> str:
        """stdout of the client's Python with these words. Fails the test with the end of stderr when it ends in error."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "HF_HOME": str(self.folder / ".hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": API_KEY,
            "TINKER_TELEMETRY": "0",
        }
        done = subprocess.run(
            [str(python_of(self.name)), *words],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"{self.name} {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-6000:]}")
        return done.stdout

    def json(self, script: str, *words: str, timeout_s: float = 300.0) -> dict:
        """What a script beside this file prints, parsed."""
        return json.loads(self.run(str(HERE / script), *words, timeout_s=timeout_s))

    def recipe(self, module: str, log: str, **options: object) -> list[dict]:
        """The metrics, a dict a step, of a cookbook recipe run from the command line as its README shows it."""
        words = [f"{name}={_word(value)}" for name, value in options.items()]
        log_path = self.folder / log
        self.run("-m", f"tinker_cookbook.recipes.{module}", f"log_path={log_path}", *words, timeout_s=600.0)
        return rows(log_path / "metrics.jsonl")


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def rows(path: Path) -> list[dict]:
    """A JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def needed(name: str) -> None:
    """Skip the test where the client's environment was not made."""
    if not is_ready(name):
        pytest.skip(f"{name} is not installed; `make client-envs` installs it")
