"""The services of compose.yaml as plain processes: the same commands, other paths and ports."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import redis
import tinker
import yaml
from tests.support.polling import wait_until
from tinker import types

from examples.local_server import free_port
from gradstream.shared.embedded.binary import find_binary

REPOSITORY = Path(__file__).parent.parent.parent
TINY = "tests/models/tiny-qwen3-shakespeare"
SERVICES = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))["services"]

pytestmark = [pytest.mark.e2e]


def command_of(name: str, run_dir: Path) -> list[str]:
    """A service's command, with this interpreter and with run_dir in place of the settings volume."""
    words = [sys.executable if word == "python" else word for word in SERVICES[name]["command"]]
    return [word.replace("/run/gradstream", str(run_dir)) for word in words]


@contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    """The command as a process, which must end by SIGTERM within three minutes."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=sink, stderr=sink)
    try:
        yield
        assert process.poll() is None, log.read_text(encoding="utf-8")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def answers(port: int) -> bool:
    """True when a Redis serves on this port."""
    with redis.Redis(port=port) as client, suppress(redis.RedisError):
        return bool(client.ping())
    return False


def wait_until_healthy(url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/api/v1/healthz", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    pytest.fail(log.read_text(encoding="utf-8"))


def write_settings(run_dir: Path, overrides: dict[str, str]) -> None:
    """What the settings service does, without fetching a model."""
    script = SERVICES["settings"]["command"][-1]
    (line,) = [line for line in script.split(";") if "gradstream.shared.config" in line]
    words = [sys.executable if word == "python" else word for word in shlex.split(line)]
    words = [word.replace("/run/gradstream", str(run_dir)) for word in words]
    for name, value in overrides.items():
        words += [f"--server.{name}", value]
    subprocess.run(words, cwd=REPOSITORY, check=True)


def test_the_services_train_a_model_together_and_stop_when_asked(tmp_path):
    redis_port, api_port = free_port(), free_port()
    overrides = {
        "redis_url": f"redis://127.0.0.1:{redis_port}",
        "api_host": "127.0.0.1",
        "api_port": str(api_port),
        "model_path": TINY,
        "tokenizer_id": TINY,
        "output_dir": str(tmp_path / "outputs"),
    }
    redis_command = [str(find_binary(None)), *command_of("redis", tmp_path)[1:]]
    redis_command += ["--port", str(redis_port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    write_settings(tmp_path, overrides)
    logs = {name: tmp_path / f"{name}.log" for name in ("redis", "worker", "housekeeping", "exports", "api")}
    url = f"http://127.0.0.1:{api_port}"

    with ExitStack() as stack:
        stack.enter_context(running(redis_command, logs["redis"]))
        # The others depend on a service that is healthy.
        wait_until(lambda: answers(redis_port), evidence=lambda: logs["redis"].read_text(encoding="utf-8"))
        for name in ("worker", "housekeeping", "exports", "api"):
            stack.enter_context(running(command_of(name, tmp_path), logs[name]))
        wait_until_healthy(url, logs["api"])
        with tinker.ServiceClient(base_url=url, api_key="tml-test") as service:
            base_model = yaml.safe_load((REPOSITORY / "configs" / "compose.yaml").read_text())["model_name"]
            client = service.create_lora_training_client(base_model=base_model, rank=4).result()
            weights = types.TensorData(data=[1.0, 1.0], dtype="float32")
            targets = types.TensorData(data=[6, 7], dtype="int64")
            datum = types.Datum(
                model_input=types.ModelInput.from_ints([5, 6]),
                loss_fn_inputs={"target_tokens": targets, "weights": weights},
            )
            first = client.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"]
            client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            second = client.forward([datum], "cross_entropy").result().metrics["loss:sum"]

    assert second < first
