"""Programs of training for gangs that are killed, and what a run that nobody killed gives."""

import os
import signal
import subprocess
from pathlib import Path

from safetensors.numpy import load_file

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Outcome, Payload, SaveWeights, SaveWeightsDone
from tests.support.gang import Client, forward_backward, gang, optim_step, output_dir, settings_file
from tests.support.polling import wait_until

STRICT = {"batch_isolation": "strict", "snapshot_idle_s": 0.2}


def program(steps: int) -> list[Payload]:
    """Two accumulated passes and a step, several times."""
    jobs: list[Payload] = []
    for step in range(steps):
        jobs += [forward_backward(12, 7, seed=step), forward_backward(30, seed=100 + step), optim_step()]
    return jobs


async def train(client: Client, model: ModelId, jobs: list[Payload]) -> list[Outcome]:
    """The outcomes of these jobs of one model, in order."""
    return await client.outcomes([await client.submit(model, job) for job in jobs])


async def weights_of(client: Client, model: ModelId, settings: Path, name: str) -> dict[str, bytes]:
    """Every file of a checkpoint that is saved now, tensor by tensor."""
    (saved,) = await train(client, model, [SaveWeights(name=name)])
    assert isinstance(saved, SaveWeightsDone), saved
    directory = parse_uri(saved.path).directory(output_dir(settings))
    return {
        f"{path.name}/{key}": value.tobytes()
        for path in sorted(directory.glob("*.safetensors"))
        for key, value in load_file(path).items()
    }


async def uninterrupted(
    tmp_path: Path, redis_url: str, engine: str, jobs: list[Payload], **fields: object
) -> tuple[list[Outcome], dict[str, bytes]]:
    """Outcomes and weights of a run that nobody disturbs, on an engine of its own."""
    directory = tmp_path / "uninterrupted"
    directory.mkdir()
    settings = settings_file(directory, redis_url=redis_url, engine=f"{engine}-calm", **STRICT, **fields)
    async with RedisIntake(redis_url, engine=f"{engine}-calm") as intake:
        calm = Client(intake)
        with gang(settings):
            model, _ = await calm.create()
            outcomes = await train(calm, model, jobs)
            return outcomes, await weights_of(calm, model, settings, "end")


def freeze(process: subprocess.Popen[bytes]) -> None:
    """Stop a process by SIGSTOP; returns when each of its threads stands still, which on a busy machine may take a while."""
    os.kill(process.pid, signal.SIGSTOP)
    threads = Path(f"/proc/{process.pid}/task")
    wait_until(lambda: all(_state(thread) in {"T", "t"} for thread in threads.iterdir()))


def _state(thread: Path) -> str:
    """The letter in its stat after the command, which may hold spaces and brackets (proc(5))."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the launcher's gang or another process by SIGKILL, and wait for its end."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
