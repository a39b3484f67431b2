"""`gradstream dead` beside a real gang: a body is submitted again, once, behind what the model went on to do."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.gang import Client, forward_backward, gang, optim_step, output_dir, settings_file

from gradstream.shared import codec
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, OwnerId, SamplerId, TenantId
from gradstream.shared.joblog.port import Intake, RecordKind
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Failed, Job, Payload, Sample, SamplingParams, UnloadModel
from gradstream.worker.dead import DeadLetters, Letter
from gradstream.worker.inspect.retry import CannotRetry, retry

COMMAND = Path(sys.executable).with_name("gradstream")
ERROR = Failed(code="server_error", category="server", message="set aside: the worker died 2 times while running it")
FIRST_OF_LANE = 1000 * 10**10 + 1


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False)


def put(letters: DeadLetters, owner: OwnerId, seq: int, payload: Payload, *, tenant: TenantId = LOCAL_TENANT) -> Letter:
    """The letter of a job that was set aside."""
    job = Job(
        future_id=FutureId(f"{owner}:{seq}"),
        owner=owner,
        seq=seq,
        op=codec.op_of(payload),
        tenant=tenant,
        payload=codec.encode(payload),
        num_tokens=8,
    )
    assert letters.put(job, ERROR, starts=2, at_ms=1_700_000_000_000)
    letter = letters.letter(job.future_id)
    assert letter is not None
    return letter


def sample(*, seed: int = 1) -> Sample:
    return Sample(path=None, prompt=b"\x05\0\0\0\x06\0\0\0", params=SamplingParams(max_tokens=3, seed=seed))


async def unready_model(intake: Intake) -> tuple[Client, ModelId]:
    """A model that no gang has made yet; it takes jobs."""
    client = Client(intake)
    model, _ = await client.create()
    return client, model


async def test_a_retry_is_the_first_job_of_a_lane_that_leaves_the_clients_seqs_alone(redis_url, engine_name, tmp_path):
    letters = DeadLetters(tmp_path)
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        client, model = await unready_model(intake)
        letter = put(letters, model, 1, optim_step())
        receipt = await retry(letters, letter, intake, at_ms=5)
        assert receipt.future_id == f"{model}:{FIRST_OF_LANE}"
        assert await client.submit(model, forward_backward(8)) == f"{model}:1"
        record = await intake.record(RecordKind.MODEL, model)
    assert record is not None
    assert (record["next_seq"], record["next_seq:1000"]) == ("2", str(FIRST_OF_LANE + 1))
    noted = letters.letter(letter.future_id)
    assert noted is not None
    assert (noted.retried_as, noted.retried_ms) == (receipt.future_id, 5)


async def test_a_second_retry_is_refused_unless_it_is_asked_for(redis_url, engine_name, tmp_path):
    letters = DeadLetters(tmp_path)
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        _, model = await unready_model(intake)
        put(letters, model, 1, optim_step())
        await retry(letters, current(letters), intake, at_ms=5)
        with pytest.raises(CannotRetry, match="was retried already"):
            await retry(letters, current(letters), intake, at_ms=6)
        receipt = await retry(letters, current(letters), intake, at_ms=7, again=True)
    assert receipt.future_id == f"{model}:{FIRST_OF_LANE + 1}"


async def test_a_retry_that_was_cut_short_is_taken_up_under_the_same_future(redis_url, engine_name, tmp_path):
    letters = DeadLetters(tmp_path)
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        _, model = await unready_model(intake)
        letter = put(letters, model, 1, optim_step())
        noted = letters.note_retry(letter, future_id=FutureId(f"{model}:{FIRST_OF_LANE}"), at_ms=5)
        other = put(letters, model, 2, optim_step())
        with pytest.raises(CannotRetry, match="cut short; retry that one first"):
            await retry(letters, other, intake, at_ms=6)
        receipt = await retry(letters, noted, intake, at_ms=7)
        assert (receipt.future_id, receipt.is_duplicate) == (f"{model}:{FIRST_OF_LANE}", False)
        assert (await retry(letters, other, intake, at_ms=8)).future_id == f"{model}:{FIRST_OF_LANE + 1}"


async def test_a_sample_is_retried_without_a_session_and_again_under_another_future(redis_url, engine_name, tmp_path):
    letters = DeadLetters(tmp_path)
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        letter = put(letters, SamplerId("s1:sample:9"), 4, sample())
        first = await retry(letters, letter, intake, at_ms=5)
        assert first.future_id.startswith("direct:sample:")
        with pytest.raises(CannotRetry, match="was retried already"):
            await retry(letters, current(letters), intake, at_ms=6)
        second = await retry(letters, current(letters), intake, at_ms=7, again=True)
        assert second.future_id != first.future_id
        view = await intake.future(first.future_id)
    assert view is not None
    assert (view.tenant, view.op) == (LOCAL_TENANT, "sample")


async def test_what_cannot_be_repeated_is_refused_with_what_can_be_done(redis_url, engine_name, tmp_path):
    letters = DeadLetters(tmp_path)
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        client, model = await unready_model(intake)
        cases = [
            (put(letters, ModelId("s9:train:1"), 1, optim_step()), "model s9:train:1 is gone"),
            (put(letters, model, 0, optim_step()), "let the client make a new one"),
            (put(letters, model, 9, UnloadModel()), "asked for again by the client"),
            (put(letters, model, 2, optim_step(), tenant=TenantId("other")), "is gone"),
        ]
        await intake.put_record(RecordKind.MODEL, ModelId("s8:train:1"), {"tenant": "local", "state": "lost"})
        cases.append((put(letters, ModelId("s8:train:1"), 1, optim_step()), "is lost, so it takes no jobs"))
        for letter, message in cases:
            with pytest.raises(CannotRetry, match=message):
                await retry(letters, letter, intake, at_ms=5)
        assert client is not None
    assert {letter.retried_as for letter in letters.survey().letters} == {None}


def current(letters: DeadLetters) -> Letter:
    """The only letter, as it is on disk now."""
    (letter,) = letters.survey().letters
    return letter


def test_a_job_is_listed_shown_retried_on_a_live_gang_and_dropped(redis_url, engine_name, tmp_path):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name)
    letters = DeadLetters(output_dir(settings))
    where = ["--config", str(tmp_path / "config.yaml")]

    async def train() -> ModelId:
        async with RedisIntake(redis_url, engine=engine_name) as intake:
            client = Client(intake)
            model, made = await client.create()
            done = [await client.submit(model, forward_backward(8)), await client.submit(model, optim_step())]
            await client.outcomes([made, *done])
            return model

    with gang(settings):
        model = asyncio.run(train())
        put(letters, model, 1, forward_backward(8, 5))
        listed = run("dead", "list", *where)
        assert f"{model}:1" in listed.stdout, listed.stderr
        shown = json.loads(run("dead", "show", f"{model}:1", "--json", *where).stdout)
        assert shown["payload"]["loss_fn"] == "cross_entropy"
        assert (shown["payload"]["tokens"]["shape"], shown["payload"]["tokens"]["dtype"]) == ("2 x [5..8]", "int32")
        assert shown["letter"]["error"]["message"] == ERROR.message
        retried = run("dead", "retry", f"{model}:1", "--wait", "60", "--json", *where)
        assert retried.returncode == 0, retried.stderr
        answer = json.loads(retried.stdout)
        assert answer["retried_as"] == f"{model}:{FIRST_OF_LANE}"
        assert answer["outcome"]["type"] == "forward_backward"
        assert answer["outcome"]["metrics"]["loss:sum"] > 0
        refused = run("dead", "retry", f"{model}:1", *where)
        assert (refused.returncode, "--again" in refused.stderr) == (2, True)
        sampled = put(letters, SamplerId("s1:sample:9"), 4, sample())
        again = json.loads(run("dead", "retry", sampled.future_id, "--wait", "60", "--json", *where).stdout)
        assert again["outcome"]["type"] == "sample"
    assert run("dead", "drop", f"{model}:1", *where).stdout == "1 dropped\n"
    assert run("dead", "drop", f"{model}:1", *where).returncode == 2
    assert run("dead", "drop", "--all", *where).stdout == "1 dropped\n"
    assert "no dead letters" in run("dead", "list", *where).stdout


def test_a_body_can_be_written_to_a_file(tmp_path):
    letters = DeadLetters(tmp_path)
    letter = put(letters, ModelId("s1:train:1"), 1, forward_backward(8))
    target = tmp_path / "body"
    assert (
        run("dead", "show", letter.future_id, "--payload", str(target), "--output-dir", str(tmp_path)).returncode == 0
    )
    assert codec.decode_payload(target.read_bytes()) == forward_backward(8)
    refused = run("dead", "show", letter.future_id, "--payload", str(target), "--output-dir", str(tmp_path))
    assert (refused.returncode, "cannot be written" in refused.stderr) == (2, True)


def test_an_unknown_letter_is_one_line_and_status_2(tmp_path):
    (tmp_path / "joblog").mkdir()
    for command in ("show", "drop"):
        done = run("dead", command, "s1:train:1:5", "--output-dir", str(tmp_path))
        assert (done.returncode, "no dead letter s1:train:1:5" in done.stderr) == (2, True)
