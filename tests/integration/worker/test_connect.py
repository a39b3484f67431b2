"""`gradstream serve --mode connect`, and gangs that torchrun starts by hand beside it: killed, restarted, refused."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tests.support.gang import Client, forward_backward, gang, optim_step, settings_file
from tests.support.launched import STOPPED_S, HandGang, Launch, Server, launching

from examples.local_server import free_port
from gradstream.engine.checkpoint.location import parse_uri
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Outcome, Payload, SaveWeights, SaveWeightsDone

pytestmark = [pytest.mark.e2e]

FIELDS = {"batch_isolation": "strict", "snapshot_idle_s": 0.2, "lease_ttl_s": 7}
Start = Callable[..., list[HandGang]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launching(tmp_path) as start:
        yield start


@pytest.fixture
def start_gang(tmp_path: Path) -> Iterator[Start]:
    """Starts a gang of one rank on each of num_nodes machines, all of which are this one."""
    parts: list[HandGang] = []

    def start(config: Path, *overrides: str, num_nodes: int = 1, elsewhere: Sequence[str] = ()) -> list[HandGang]:
        port = free_port()
        started = [
            HandGang.of_config(
                config, *overrides, *(elsewhere if node else ()), node=node, num_nodes=num_nodes, port=port,
                log=tmp_path / f"gang-{len(parts)}-{node}.txt",
            )
            for node in range(num_nodes)
        ]  # fmt: skip
        parts.extend(started)
        return started

    yield start
    for part in parts:
        part.end()


def folder_of(parent: Path, name: str) -> Path:
    """A new folder."""
    (parent / name).mkdir()
    return parent / name


def write_config(folder: Path, *, num_ranks: int = 1, **fields: object) -> Path:
    """A config that both the server and the gang read; its engine is that of settings_file."""
    settings_file(folder, redis_url="redis://unused", engine="main", num_ranks=num_ranks, **FIELDS, **fields)
    path = folder / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("redis_url")]
    path.write_text("\n".join(lines) + "\n")
    return path


@asynccontextmanager
async def talking_to(server: Server) -> AsyncIterator[Client]:
    async with RedisIntake(str(server.settings.redis_url), engine="main") as intake:
        yield Client(intake)


def program(steps: int) -> list[Payload]:
    """Two accumulated passes and a step, several times."""
    jobs: list[Payload] = []
    for step in range(steps):
        jobs += [forward_backward(12, 7, seed=step), forward_backward(30, seed=100 + step), optim_step()]
    return jobs


async def train(client: Client, model, jobs: list[Payload]) -> list[Outcome]:
    return await client.outcomes([await client.submit(model, job) for job in jobs])


async def weights_of(client: Client, model, output_dir: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint that is saved now."""
    (saved,) = await train(client, model, [SaveWeights(name="end")])
    assert isinstance(saved, SaveWeightsDone), saved
    files = sorted(parse_uri(saved.path).directory(output_dir).glob("*.safetensors"))
    return {f"{file.name}/{name}": value.tobytes() for file in files for name, value in load_file(file).items()}


async def uninterrupted(folder: Path, redis_url: str, engine: str, jobs: list[Payload], *, num_ranks: int):
    """Outcomes and weights of a gang that nobody disturbs, which has its settings from a launcher."""
    settings = settings_file(folder, redis_url=redis_url, engine=engine, num_ranks=num_ranks, **FIELDS)
    async with RedisIntake(redis_url, engine=engine) as intake:
        calm = Client(intake)
        with gang(settings, num_ranks=num_ranks):
            model, _ = await calm.create()
            return await train(calm, model, jobs), await weights_of(calm, model, folder / "out")


@pytest.mark.slow
@pytest.mark.config_field("num_ranks", "data_parallel_replicate_size", "worker_connection_timeout", "lease_ttl_s")
@pytest.mark.parametrize("num_nodes", [1, 2])
async def test_a_gang_and_a_launcher_that_are_killed_in_turn_end_with_the_bits_of_a_calm_run(
    launch: Launch, start_gang: Start, tmp_path: Path, redis_url: str, engine_name: str, num_nodes: int
) -> None:
    jobs = program(4)
    expected = await uninterrupted(folder_of(tmp_path, "calm"), redis_url, engine_name, jobs, num_ranks=num_nodes)
    config = write_config(tmp_path, num_ranks=num_nodes)
    # Gangs may be started before the server that they serve.
    first = start_gang(config, f"--server.output_dir={tmp_path / 'out'}", num_nodes=num_nodes)
    server = launch("--mode", "connect", "--nnodes", str(num_nodes), config=str(config)).until_ready()
    assert server.member("gradstream.worker.torchrun") is None
    async with talking_to(server) as client:
        model, _ = await client.create()
        outcomes = await train(client, model, jobs[:5])
        # On two machines the death of one part ends the other.
        first[-1].kill()
        assert num_nodes == 1 or first[0].until_ended() != 0
        waiting = [await client.submit(model, job) for job in jobs[5:8]]
        start_gang(config, f"--server.output_dir={tmp_path / 'out'}", num_nodes=num_nodes)
        outcomes += await client.outcomes(waiting)
    server.until(lambda: "a gang leads again: " in server.text)
    server.process.kill()
    server.process.wait()
    server = launch("--mode", "connect", "--nnodes", str(num_nodes), config=str(config)).until_ready()
    async with talking_to(server) as client:
        client.resume(model, seq=len(jobs[:8]) + 1)
        outcomes += await train(client, model, jobs[8:])
        assert (outcomes, await weights_of(client, model, server.output_dir)) == expected


@pytest.mark.slow
async def test_a_second_gang_stands_by_and_takes_over(launch: Launch, start_gang: Start, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    server = launch("--mode", "connect", config=str(config))
    (first,) = start_gang(config)
    server.until_ready()
    (second,) = start_gang(config)
    server.until(lambda: "lease_wait" in second.text)
    assert server.text.count("a gang leads") == 1
    first.process.terminate()
    assert first.until_ended() is not None
    server.until(lambda: "a gang leads again: " in server.text)
    async with talking_to(server) as client:
        model, _ = await client.create()
        assert len(await train(client, model, program(1))) == 3
    second.process.terminate()
    second.until_ended()
    server.until(lambda: "no gang leads any more" in server.text)


async def test_a_gang_with_another_config_than_the_servers_is_refused_with_the_field(
    launch: Launch, start_gang: Start, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    server = launch("--mode", "connect", config=str(config))
    server.until(lambda: "waiting for the gang" in server.text)
    (stranger,) = start_gang(config, "--server.lora_alpha=8", "--server.log_level=DEBUG")
    assert stranger.until_ended() != 0
    assert (
        "this gang's config is not that of the server it would serve: lora_alpha: 8.0 here, 16.0 there. "
        in stranger.text
    )
    assert "log_level" not in stranger.text
    assert 'Traceback (most recent call last):\n  File "<frozen runpy>"' not in stranger.text
    (crowd,) = start_gang(config, "--server.num_ranks=2")
    assert crowd.until_ended() != 0
    assert "num_ranks: 2 is what the config's parallel sizes give, and torchrun started 1" in crowd.text
    assert server.process.poll() is None


@pytest.mark.slow
async def test_ranks_with_different_configs_are_refused_on_every_machine(
    launch: Launch, start_gang: Start, tmp_path: Path
) -> None:
    config = write_config(tmp_path, num_ranks=2)
    server = launch("--mode", "connect", "--nnodes", "2", config=str(config))
    server.until(lambda: "waiting for the gang" in server.text)
    parts = start_gang(config, num_nodes=2, elsewhere=["--server.seed=7"])
    for part in parts:
        assert part.until_ended() != 0
        assert "rank 1 on " in part.text
        assert "has another config than rank 0: seed: 7 here, 42 there" in part.text


@pytest.mark.slow
async def test_a_launcher_with_another_config_than_the_gang_that_leads_is_refused(
    launch: Launch, start_gang: Start, tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    config = write_config(tmp_path)
    place = [f"--server.redis_url={redis_url}", f"--server.engine_name={engine_name}"]
    server = launch("--mode", "connect", *place, config=str(config))
    # The URL need not be in the config, nor among the fields that both sides share.
    start_gang(config, "--redis-url", redis_url, f"--server.engine_name={engine_name}")
    server.until_ready()
    assert redis_url not in server.text
    server.process.terminate()
    assert server.process.wait(STOPPED_S) == 0
    other = launch("--mode", "connect", *place, "--server.seed=7", config=str(config))
    assert other.process.wait(STOPPED_S) == 2
    assert "leads a gang that was started with another config: seed: 7 here, 42 there" in other.text


def test_a_gang_that_finds_no_server_says_where_it_looked_and_what_would_help(
    start_gang: Start, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    (lonely,) = start_gang(config, "--server.worker_connection_timeout=1")
    assert lonely.until_ended() != 0
    assert "no server within worker_connection_timeout: 1 s" in lonely.text
    assert f"redis_url is not set, so it was looked for at {tmp_path / 'out' / 'redis'}" in lonely.text
    assert "GRADSTREAM_REDIS_URL" in lonely.text


@pytest.mark.slow
def test_a_gang_over_two_machines_is_started_by_the_launcher_and_by_the_command_that_it_prints(
    launch: Launch, tmp_path: Path
) -> None:
    config = write_config(tmp_path, num_ranks=2)
    port = str(free_port())
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    server = launch(*meet, "--server.seed=7", config=str(config))
    server.until(lambda: "  torchrun " in server.text)
    (line,) = [line for line in server.text.splitlines() if line.startswith("  torchrun ")]
    part = HandGang.of_command(line.strip(), log=tmp_path / "part.txt")
    try:
        server.until_ready()
        server.process.terminate()
        assert server.process.wait(STOPPED_S) == 0
        # The gang was stopped in order.
        assert part.until_ended() == 0
    finally:
        part.end()
