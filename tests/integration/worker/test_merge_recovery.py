"""Gangs that die between two merges of an adapter, and successors that go on to the same bits."""

from collections.abc import AsyncIterator

import pytest
from safetensors.numpy import load_file
from tests.support.gang import TINY, Client, gang, output_dir, settings_file
from tests.support.golden import replayed
from tests.support.polling import until
from tests.support.recovery import STRICT, kill, program, train, uninterrupted, weights_of

from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.clock import SystemClock
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.worker.disklog.archive import export_log
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.selection import Choice


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


@pytest.mark.config_field("merge_lora_interval", "reset_optimizer_on_merge")
async def test_a_run_with_merges_over_a_killed_gang_ends_with_the_bits_of_one_that_nobody_killed(
    client, tmp_path, redis_url, engine_name
):
    merging = {"merge_lora_interval": 2, "reset_optimizer_on_merge": True}
    jobs = program(6)
    expected = await uninterrupted(tmp_path, redis_url, engine_name, jobs, **merging)
    # One merge is in the snapshot, the next one has to be made again.
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **STRICT, **merging)
    with gang(settings) as process:
        model, _ = await client.create()
        outcomes = await train(client, model, jobs[:8])
        store = SnapshotStore(output_dir(settings) / "snapshots" / engine_name)
        await until(lambda: any(cut.models[model].step == 2 for cut in store.cuts() if model in cut.models))
        outcomes += await train(client, model, jobs[8:13])
        kill(process)
    with gang(settings):
        outcomes += await train(client, model, jobs[13:])
        weights = await weights_of(client, model, settings, "end")
    assert outcomes == expected[0]
    assert [outcome.metrics["merges"] for outcome in outcomes[2::3]] == [0, 1, 1, 2, 2, 3]
    assert weights == expected[1]

    # What the log itself says is enough to replay it.
    file, dump = tmp_path / "run.gslog", tmp_path / "dump"
    log = DiskLog(output_dir(settings) / "joblog" / engine_name)
    export_log(log, file, choice=Choice(), clock=SystemClock())
    report = replayed(
        "--log", str(file), "--model-path", str(TINY), "--dump", str(dump), "--dump-at", f"{model}:{len(jobs)}"
    )
    assert (report.num_differing, report.num_not_run) == (0, 0)
    before, after = (
        load_file(dump / f"{model.replace(':', '+')}.{moment}.safetensors") for moment in ("before", "after")
    )
    name = "model.layers.0.self_attn.q_proj.a"
    assert (before[f"frozen.{name}"].shape[0], after[f"frozen.{name}"].shape[0]) == (8, 12)
