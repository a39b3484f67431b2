"""`gradstream replay` and `bisect` on logs of real gangs: beside a running one, from snapshots, and with checkpoints of before."""

import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.gang import TINY, Client, forward_backward, gang, optim_step, output_dir, settings_file
from tests.support.golden import bisect, found, replay, replayed

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.clock import SystemClock
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import (
    Failed,
    LoadWeights,
    Outcome,
    Payload,
    SaveForSampler,
    SaveForSamplerDone,
    SaveWeights,
    SaveWeightsDone,
)
from gradstream.worker.disklog.archive import export_log
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.selection import Choice


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


def program(steps: int, *, seed: int = 0) -> list[Payload]:
    """Two accumulated passes and a step, several times."""
    jobs: list[Payload] = []
    for step in range(seed, seed + steps):
        jobs += [forward_backward(12, 7, seed=step), forward_backward(30, seed=100 + step), optim_step()]
    return jobs


async def train(client: Client, model: ModelId, jobs: list[Payload]) -> list[Outcome]:
    outcomes = await client.outcomes([await client.submit(model, job) for job in jobs])
    assert not any(isinstance(outcome, Failed) for outcome in outcomes), outcomes
    return outcomes


def server(tmp_path: Path) -> list[str]:
    """The options that name the server of `settings_file`."""
    return ["--config", str(tmp_path / "config.yaml")]


def files_below(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()
    }


async def test_a_servers_log_is_replayed_beside_it_and_after_it_from_the_start_and_from_snapshots(
    client, tmp_path, redis_url, engine_name
):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, snapshot_idle_s=1e6)
    out = output_dir(settings)
    with gang(settings):
        model, _ = await client.create()
        other, _ = await client.create(2)
        (*_, saved) = await train(client, model, [*program(2), SaveWeights(name="a")])
        await train(client, other, program(1, seed=50))
        beside = replayed(*server(tmp_path))
        assert (beside.begin, beside.num_differing, beside.num_not_run) == (None, 0, 0)
        assert beside.num_equal == 2 + 6 + 1 + 3
        assert isinstance(saved, SaveWeightsDone)
        # A snapshot is taken with it.
        await train(client, model, [LoadWeights(path=saved.path, with_optimizer=True), *program(1, seed=7)])
        await train(client, model, [SaveWeights(name="a", overwrite=True)])
        (sampler,) = await train(client, model, [SaveForSampler(name="s")])
        assert isinstance(sampler, SaveForSamplerDone)
        assert sampler.path is not None
        await client.outcomes([await client.sample(sampler.path, 0), await client.sample(None, 1)])
        await train(client, other, program(1, seed=60))
    cuts = SnapshotStore(out / "snapshots" / engine_name).cuts()
    assert len(cuts) >= 2, "one with the load, one at the end"
    shutil.rmtree(parse_uri(saved.path).directory(out))
    before = files_below(out)

    everything = replayed(*server(tmp_path), "--from", "start", "--samples")
    assert (everything.num_differing, everything.num_not_run) == (0, 0)
    assert {"sample", "load_weights", "save_weights_for_sampler"} <= {job.op for job in everything.jobs}

    newest = replayed(*server(tmp_path))
    load_cut = min(cuts, key=lambda cut: cut.id)
    assert newest.begin is not None
    assert newest.num_differing == 0
    assert newest.num_equal < everything.num_equal

    named = replayed(*server(tmp_path), "--from", f"{load_cut.head.epoch}-{load_cut.head.number}", "--model", model)
    assert (named.models, named.num_differing, named.num_not_run) == ([model], 0, 0)

    to_load = replayed(*server(tmp_path), "--to", f"{model}:8")
    assert (to_load.jobs[-1].op, to_load.begin) == ("load_weights", None)
    assert to_load.num_differing == 0

    late = replay(*server(tmp_path), "--from", "snapshot", "--to", f"{model}:2")
    assert late.exit_code == 2
    assert "no snapshot" in late.output

    grown = found(*server(tmp_path), "--expr", "exp_avg_sq.max() > 0", "--goes-on", status=0)
    assert grown.replayed_from == "start"
    nothing = found(*server(tmp_path), "--non-finite", status=1)
    assert nothing.replayed_from != "start"
    assert not found(*server(tmp_path), "--digest-differs", status=1).found
    assert bisect(*server(tmp_path), "--loss-above", "0").exit_code == 0

    assert files_below(out) == before


async def test_a_checkpoint_of_before_the_log_is_read_and_must_be_the_one_that_was_loaded(
    client, tmp_path, redis_url, engine_name
):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    settings = settings_file(first, redis_url=redis_url, engine=engine_name)
    out = output_dir(settings)
    with gang(settings):
        model, _ = await client.create()
        (*_, saved) = await train(client, model, [*program(2), SaveWeights(name="a")])
    assert isinstance(saved, SaveWeightsDone)
    # Another engine of the same files, so its log knows nothing of the save.
    later = settings_file(second, redis_url=redis_url, engine=f"{engine_name}-b", output_dir=out)
    async with RedisIntake(redis_url, engine=f"{engine_name}-b") as intake:
        successor = Client(intake, session="s2")
        with gang(later):
            load = LoadWeights(path=saved.path, with_optimizer=True, create=True, session_id=successor.session)
            loaded, _ = await successor.create(payload=load)
            await train(successor, loaded, program(1))
    whole = [*server(second), "--from", "start"]
    assert replayed(*whole).num_differing == 0
    file = tmp_path / "carried.gslog"
    export_log(DiskLog(out / "joblog" / f"{engine_name}-b"), file, Choice(), clock=SystemClock())
    carried = ["--log", str(file), "--model-path", str(TINY)]
    assert replayed(*carried, "--output-dir", str(out)).num_equal == 4
    assert "is missing" in replay(*carried).output

    directory = parse_uri(saved.path).directory(out)
    aside = directory.with_name("aside")
    directory.rename(aside)
    missing = replay(*whole)
    assert missing.exit_code == 2
    assert f"checkpoint {saved.path} was loaded and is missing" in missing.output

    shutil.copytree(aside, directory)
    manifest = directory / "manifest.json"
    text = manifest.read_text()
    created = text.split('"created_ms": ')[1].split(",")[0]
    manifest.write_text(text.replace(f'"created_ms": {created}', f'"created_ms": {int(created) + 1}'))
    replaced = replay(*whole)
    assert replaced.exit_code == 2
    assert f"checkpoint {saved.path} was replaced since" in replaced.output
    # The snapshot that was taken with the load does not need it.
    assert replayed(*server(second)).num_differing == 0


async def test_a_run_over_a_killed_gang_is_replayed_through_the_death(client, tmp_path, redis_url, engine_name):
    settings = settings_file(
        tmp_path, redis_url=redis_url, engine=engine_name, snapshot_idle_s=0.2, batch_isolation="strict"
    )
    with gang(settings) as process:
        model, _ = await client.create()
        other, _ = await client.create(2)
        await train(client, model, program(2))
        await train(client, other, program(1, seed=30))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with gang(settings):
        await train(client, model, program(2, seed=10))
        await train(client, other, program(1, seed=40))
    whole = replayed(*server(tmp_path), "--from", "start")
    assert (whole.num_equal, whole.num_differing, whole.num_not_run) == (2 + 9 + 9, 0, 0)
    assert {job.batch.partition("-")[0] for job in whole.jobs} == {"1", "2"}
    own = replayed(*server(tmp_path), "--from", "start", "--model", other)
    assert (own.models, own.num_equal) == ([other], 1 + 6)
    assert replayed(*server(tmp_path)).num_differing == 0
