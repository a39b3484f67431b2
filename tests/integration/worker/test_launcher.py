"""`gradstream serve` as a user runs it: real processes, stopped, killed and misconfigured."""

import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import redis
from tests.support.launched import ROOT, STOPPED_S, Launch, all_gone, launching

from examples.local_server import free_port
from gradstream.shared.embedded.binary import find_binary

pytestmark = [pytest.mark.e2e]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launching(tmp_path) as start:
        yield start


def test_it_says_when_it_is_ready_and_stops_everything_on_sigterm(launch: Launch) -> None:
    server = launch().until_ready()
    assert server.health() == 200
    assert f"TINKER_BASE_URL=http://127.0.0.1:{server.port} TINKER_API_KEY=tml-" in server.text
    assert (server.output_dir / "run" / "settings.json").stat().st_mode & 0o777 == 0o600
    family = server.family()
    assert len(family) >= 6  # redis, torchrun, a rank, housekeeping, exports, the API
    server.process.terminate()
    assert server.process.wait(STOPPED_S) == 0
    assert all_gone(family)
    assert server.text.endswith("stopped\n")
    assert not (server.output_dir / "run" / "settings.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny_full", "tiny_moe"])
def test_the_small_example_configs_become_ready(launch: Launch, config: str) -> None:
    assert launch(config=f"configs/{config}.yaml").until_ready().health() == 200


@pytest.mark.slow
def test_ctrl_c_twice_is_as_good_as_once(launch: Launch) -> None:
    server = launch().until_ready()
    family = server.family()
    server.process.send_signal(signal.SIGINT)
    server.until(lambda: "stopping" in server.text)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(STOPPED_S) == 0
    assert all_gone(family)
    assert "Traceback" not in server.text


@pytest.mark.slow
def test_it_can_be_stopped_before_it_is_ready(launch: Launch) -> None:
    server = launch()
    server.until(lambda: server.member("gradstream.worker.torchrun"))
    family = server.family()
    server.process.terminate()
    assert server.process.wait(STOPPED_S) == 0
    assert all_gone(family)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "gradstream.api",
        "gradstream.worker",
        "gradstream.worker.torchrun",
        "gradstream.worker.housekeeping",
        "gradstream.worker.exporter",
    ],
)
def test_a_killed_process_is_replaced(launch: Launch, module: str) -> None:
    server = launch("--server.restart_backoff_s", "0.1").until_ready()
    victim = server.member(module)
    assert victim is not None
    family = server.family()
    victim.kill()

    def is_replaced() -> bool:
        now = server.member(module)
        return now is not None and now.pid != victim.pid

    server.until(is_replaced)
    server.until(lambda: server.health() == 200)
    assert "is started again" in server.text
    if module == "gradstream.worker.torchrun":
        ranks = [process for process in family if process.pid != victim.pid and "gradstream.worker" in _line(process)]
        assert all_gone(ranks), "a rank outlived its torchrun"


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_nothing_outlives_a_killed_launcher_and_the_next_one_starts_at_once(launch: Launch) -> None:
    first = launch().until_ready()
    family = first.family()
    first.process.kill()
    first.process.wait()
    assert all_gone(family)
    second = launch()
    second.until_ready()
    assert second.health() == 200


@pytest.mark.config_field("model_path")
def test_a_model_that_cannot_be_loaded_stops_the_server_with_one_sentence(launch: Launch, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(ROOT / "tests/models/tiny-qwen3-shakespeare", broken)
    (broken / "model.safetensors").unlink()
    server = launch("--server.model_path", str(broken))
    assert server.process.wait(STOPPED_S) == 2
    lines = [line for line in server.text.splitlines() if line.startswith("error: ")]
    assert any(str(broken) in line for line in lines), server.text
    assert "Traceback" not in server.text


def test_a_port_in_use_is_said_before_anything_starts(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = launch(port=port)
        assert server.process.wait(STOPPED_S) == 2
    assert f"error: api_host 127.0.0.1, api_port {port}: cannot listen there" in server.text
    assert not server.output_dir.exists()


@pytest.mark.slow
@pytest.mark.config_field("api_port")
def test_when_nobody_chose_a_port_and_the_usual_one_is_taken_the_server_takes_another_one_and_says_so(
    launch: Launch,
) -> None:
    with ExitStack() as stack:
        # Somebody else's server on it does as well.
        with suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 5555)))
        server = launch(port=0).until_ready()
        said = re.search(
            r"PORT 5555 IS TAKEN by another program: this server listens on PORT (\d+) instead", server.text
        )
        assert said is not None, server.text
        server.port = int(said[1])
        assert server.port != 5555
        assert server.health() == 200
        assert f"TINKER_BASE_URL=http://127.0.0.1:{server.port} " in server.text


@pytest.mark.slow
@pytest.mark.config_field(
    "api_host", "api_port", "log_level", "operation_timeout_s", "redis_data_dir", "redis_memory_limit", "redis_binary",
    "durability", "restart_backoff_s", "max_restart_backoff_s", "stop_timeout_s", "worker_bind_port",
)  # fmt: skip
def test_every_option_of_the_command_line_takes_effect(launch: Launch, tmp_path: Path) -> None:
    meet = free_port()
    binary = find_binary()
    options = ["--mode", "auto", "--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(meet)]
    options += ["--operation-timeout", "77", "--log-level", "DEBUG", "--api-host", "localhost"]
    options += ["--server.redis_data_dir", str(tmp_path / "queue"), "--server.redis_memory_limit=64MB"]
    options += ["--server.redis_binary", str(binary), "--server.durability", "everysec", "--server.worker_bind_port=1"]
    options += ["--server.restart_backoff_s=0.25", "--server.max_restart_backoff_s", "2", "--server.stop_timeout_s=20"]
    server = launch(*options).until_ready()
    assert f"ready: gradstream/tiny-qwen3-shakespeare at http://localhost:{server.port}" in server.text
    assert "worker_bind_port: no effect, since Redis takes the place of ZMQ here" in server.text
    settings = server.settings
    assert (settings.operation_timeout_s, settings.restart_backoff_s, settings.stop_timeout_s) == (77.0, 0.25, 20.0)
    assert '"level": "debug"' in (server.output_dir / "logs" / "gang.log").read_text() + server.text
    torchrun = server.member("gradstream.worker.torchrun")
    assert torchrun is not None
    assert ["--master-port", str(meet)] == torchrun.cmdline()[torchrun.cmdline().index("--master-port") :][:2]
    with redis.Redis.from_url(str(settings.redis_url), protocol=2) as client:
        names = ("dir", "maxmemory", "appendfsync")
        values = [client.config_get(name)[name] for name in names]
        assert values == [str(tmp_path / "queue"), str(64 * 1024**2), "everysec"]
        assert Path(client.info("server")["executable"]).resolve() == Path(binary).resolve()


@pytest.mark.slow
def test_two_servers_do_not_share_an_output_directory(launch: Launch) -> None:
    first = launch().until_ready()
    second = launch()
    assert second.process.wait(STOPPED_S) == 2
    assert re.search(
        rf"error: output_dir: .* is in use by another gradstream server \(process {first.process.pid}\)", second.text
    )
    assert first.health() == 200


@pytest.mark.slow
def test_a_redis_that_does_not_answer_is_refused(launch: Launch) -> None:
    server = launch(f"--server.redis_url=redis://127.0.0.1:{free_port()}")
    assert server.process.wait(STOPPED_S) == 2
    assert "error: " in server.text
    assert "Traceback" not in server.text


@pytest.mark.slow
@pytest.mark.config_field("redis_url", "engine_name")
def test_an_external_redis_is_used_instead_of_the_embedded_one(
    launch: Launch, redis_url: str, engine_name: str
) -> None:
    server = launch(f"--server.redis_url={redis_url}", f"--server.engine_name={engine_name}").until_ready()
    assert server.health() == 200
    assert not (server.output_dir / "redis").exists()


@pytest.mark.slow
@pytest.mark.config_field("worker_connection_timeout")
def test_a_gang_that_never_reports_is_started_again(launch: Launch) -> None:
    server = launch("--server.worker_connection_timeout", "0.5", "--server.restart_backoff_s", "0.1")
    server.until(lambda: server.text.count("did not report for work within worker_connection_timeout: 0.5 s") >= 2)


@pytest.mark.slow
@pytest.mark.config_field("worker_max_retries")
def test_a_gang_that_keeps_failing_is_called_an_outage(launch: Launch) -> None:
    server = launch("--server.worker_max_retries", "0", "--server.restart_backoff_s", "0.1").until_ready()
    rank = server.member("gradstream.worker")
    assert rank is not None
    rank.kill()
    server.until(lambda: "OUTAGE: the gang failed 1 times in a row" in server.text)
    server.until(lambda: server.member("gradstream.worker"))
