"""`gradstream queue` on a real server: what waits, what is held and for what, what runs, and a queue of a stopped server."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.support.gang import TINY, Client, forward_backward, gang, optim_step, settings_file

from gradstream.shared.embedded.config import EmbeddedConfig
from gradstream.shared.embedded.server import EmbeddedServer
from gradstream.shared.ids import ModelId, TenantId
from gradstream.shared.joblog import lua
from gradstream.shared.joblog.look import QueueReader
from gradstream.shared.joblog.port import Submission
from gradstream.shared.joblog.queue_look import QueueLook
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.joblog.redis_intake import RedisIntake

COMMAND = Path(sys.executable).with_name("gradstream")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False)


def look(redis_url: str, engine: str, *arguments: str) -> QueueLook:
    done = run("queue", "--redis-url", redis_url, "--engine", engine, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=QueueLook)


async def fill(redis_url: str, engine: str) -> ModelId:
    """A model with seq 0 to 2 in the log, 3 missing, 4 and 5 held; a second model of another tenant; one sample."""
    async with RedisIntake(redis_url, engine=engine) as intake:
        client = Client(intake)
        model, _ = await client.create()
        await client.submit(model, forward_backward(8, 6))
        await client.submit(model, optim_step())
        client._next_seq[model] = 4
        await client.submit(model, forward_backward(5))
        await client.submit(model, optim_step())
        await client.sample(None, 1)
        await intake.submit(
            Submission(
                owner=ModelId("s2:train:0"),
                seq=0,
                op="create_model",
                tenant=TenantId("other"),
                payload=b"x",
                model_record={"tenant": "other"},
            )
        )
        return model


def test_what_waits_is_listed_with_its_place_and_what_is_held_with_the_seq_it_waits_for(redis_url, engine_name):
    model = asyncio.run(fill(redis_url, engine_name))
    found = look(redis_url, engine_name)
    places = [(job.place, job.place_in_owner, job.op, job.owner, job.tokens) for job in found.jobs]
    assert places == [
        (1, 1, "create_model", model, 0),
        (2, 2, "forward_backward", model, 14),
        (3, 3, "optim_step", model, 0),
        (4, 1, "sample", "s1:sample:9", 0),
        (5, 1, "create_model", "s2:train:0", 0),
    ]
    assert [(job.seq, job.waits_for_seq, job.op) for job in found.held] == [
        (4, 3, "forward_backward"),
        (5, 3, "optim_step"),
    ]
    assert found.num_jobs == 7
    assert found.gang.lease_left_s == 0
    assert found.running is None
    assert [(tenant.tenant, tenant.num_jobs) for tenant in found.tenants] == [("local", 6), ("other", 1)]
    assert found.bytes == sum(tenant.bytes for tenant in found.tenants)
    first = next(owner for owner in found.owners if owner.owner == model)
    assert (first.state, first.num_queued, first.num_held, first.next_seq, first.tokens) == ("creating", 3, 2, 3, 19)


def test_a_model_or_a_tenant_can_be_picked_out(redis_url, engine_name):
    model = asyncio.run(fill(redis_url, engine_name))
    of_model = look(redis_url, engine_name, "--model", model)
    assert {job.owner for job in of_model.jobs} == {model}
    assert len(of_model.held) == 2
    of_tenant = look(redis_url, engine_name, "--tenant", "other")
    assert [(job.owner, job.place) for job in of_tenant.jobs] == [("s2:train:0", 5)]
    assert of_tenant.held == []


def test_the_tables_name_the_missing_seq_and_how_much_was_left_out(redis_url, engine_name):
    asyncio.run(fill(redis_url, engine_name))
    done = run("queue", "--redis-url", redis_url, "--engine", engine_name, "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert "no gang leads: jobs wait until one does" in done.stdout
    assert "7 jobs wait or run" in done.stdout
    assert "... and 3 more queued; --limit 0 lists all" in done.stdout
    assert "waits for" in done.stdout


def test_a_long_queue_is_cut_and_the_totals_are_not(redis_url, engine_name):
    asyncio.run(fill(redis_url, engine_name))
    with QueueReader(redis_url, engine=engine_name) as reader:
        found = reader.look(max_jobs=2)
    assert (len(found.jobs), len(found.held), found.is_cut, found.num_jobs) == (2, 2, True, 7)


def test_jobs_that_the_leading_gang_began_are_running_and_those_of_a_dead_one_are_not(redis_url, engine_name):
    asyncio.run(fill(redis_url, engine_name))
    with RedisFeed(redis_url, engine=engine_name) as feed, QueueReader(redis_url, engine=engine_name) as reader:
        epoch = feed.acquire(owner="launcher")
        feed.mark_started(["s1:train:1:0"], epoch=epoch)
        found = reader.look()
        assert found.running is not None
        assert (found.running.future_ids, found.running.op) == (["s1:train:1:0"], "create_model")
        assert found.gang.lease_owner == "launcher"
        later = feed.acquire(owner="launcher")
        found = reader.look()
        assert (later, found.gang.epoch, found.running) == (epoch + 1, epoch + 1, None)
        assert found.jobs[0].starts == 1


def test_a_gang_that_says_what_it_runs_is_believed_while_it_leads(redis_url, engine_name):
    asyncio.run(fill(redis_url, engine_name))
    with RedisFeed(redis_url, engine=engine_name) as feed, QueueReader(redis_url, engine=engine_name) as reader:
        epoch = feed.acquire(owner="launcher")
        note = reader._client.register_script(lua.load("running").text)
        prefix = f"gs:{{{engine_name}}}:"
        said = note(keys=[f"{prefix}log"], args=[prefix, epoch, 7, "forward_backward", "s1:train:1:1", "s1:train:1:99"])
        assert said == [b"ok"]
        running = reader.look().running
        assert running is not None
        # The second future has no open job: it ended meanwhile.
        assert (running.future_ids, running.batch) == (["s1:train:1:1"], f"{epoch}-7")
        feed.acquire(owner="launcher")
        assert reader.look().running is None
        assert note(keys=[f"{prefix}log"], args=[prefix, epoch, 8, "sample"])[0] == b"fenced"


def test_a_gang_empties_the_queue_and_the_held_jobs_stay(redis_url, engine_name, tmp_path):
    async def work() -> QueueLook:
        async with RedisIntake(redis_url, engine=engine_name) as intake:
            client = Client(intake)
            model, made = await client.create()
            await client.outcome(made)
            done = await client.submit(model, forward_backward(8))
            client._next_seq[model] = 3
            await client.submit(model, optim_step())
            await client.outcome(done)
        return look(redis_url, engine_name)

    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name)
    with gang(settings):
        found = asyncio.run(work())
    assert (found.jobs, [job.waits_for_seq for job in found.held]) == ([], [2])
    assert found.gang.base_model == "tiny"
    assert found.gang.lease_left_s > 0
    assert found.job_ms is not None
    assert found.last_batch == f"{found.gang.epoch}-2"
    assert (found.owners[0].state, found.owners[0].applied, found.owners[0].next_seq) == ("ready", 1, 2)


def test_following_prints_a_line_of_json_for_every_look(redis_url, engine_name):
    asyncio.run(fill(redis_url, engine_name))
    arguments = ["queue", "--redis-url", redis_url, "--engine", engine_name, "--json", "--follow", "--every", "0.1"]
    # A shell that starts the tests in the background has Ctrl-C ignored in all its children.
    command = ["env", "--default-signal=INT", str(COMMAND), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = [msgspec.json.decode(process.stdout.readline(), type=QueueLook) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert [len(found.jobs) for found in looks] == [5, 5, 5]
    assert looks[2].jobs[0].age_s > looks[0].jobs[0].age_s


def test_the_queue_of_a_stopped_server_is_read_from_its_files(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model_path: {TINY}\nenable_lora: true\noutput_dir: {tmp_path / 'out'}\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    with EmbeddedServer(EmbeddedConfig(data_dir=tmp_path / "out" / "redis")) as server:
        asyncio.run(fill(server.url, "main"))
        with RedisFeed(server.url, engine="main") as feed:
            # A gang that leads, with a job that it began, when everything dies.
            feed.mark_started(["s1:train:1:0"], epoch=feed.acquire(owner="launcher"))
    for option in (["--config", str(config)], ["--output-dir", str(tmp_path / "out")]):
        done = run("queue", *option, "--json")
        assert done.returncode == 0, done.stderr
        assert "no server runs there" in done.stderr
        found = msgspec.json.decode(done.stdout, type=QueueLook)
        assert len(found.jobs) == 5
        assert (found.gang.lease_owner, found.gang.lease_left_s, found.running) == ("", 0, None)
        assert not any(job.is_running for job in found.jobs)
    assert "no gang leads" in run("queue", "--config", str(config)).stdout


def test_a_model_or_an_engine_that_is_not_there_is_an_error_that_names_what_is(redis_url, engine_name):
    model = asyncio.run(fill(redis_url, engine_name))
    with RedisFeed(redis_url, engine=engine_name) as feed:
        feed.acquire(owner="launcher")
    done = run("queue", "--redis-url", redis_url, "--engine", engine_name, "--model", "s9:train:9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --model: s9:train:9 is not on record there; there are {model}, s2:train:0\n"
    done = run("queue", "--redis-url", redis_url, "--engine", "nobody")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --engine: no gang of nobody has led there; there are ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "give --config FILE", id="nothing"),
        pytest.param(["--redis-url", "unix:///nowhere.sock"], "unix:///nowhere.sock cannot be reached", id="redis"),
        pytest.param(["--redis-url", "redis://:secret@127.0.0.1:1/0"], "redis://127.0.0.1:1/0 cannot", id="password"),
        pytest.param(["--output-dir", "/nowhere"], "/nowhere: there is no such directory", id="directory"),
        pytest.param(["--redis-url", "hallo"], "hallo", id="no-url"),
    ],
)
def test_a_server_that_cannot_be_found_is_one_line_and_status_2(arguments, message):
    done = run("queue", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr
