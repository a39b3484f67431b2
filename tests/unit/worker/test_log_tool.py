"""`gradstream log` on real segments and on an exported file."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from tests.support.disklog import last_segment, open_writer, succeed
from tests.support.gang import forward_backward, optim_step
from typer.testing import CliRunner

from gradstream.shared import codec
from gradstream.shared.ids import FutureId, ModelId, TenantId
from gradstream.shared.joblog.port import FutureStatus, LogEntry, RecordKind
from gradstream.shared.wire import Failed, ForwardBackwardDone, Job, OptimStepDone, Outcome, Payload, Plan
from gradstream.worker.cli_log import app
from gradstream.worker.disklog.frames import LoggedBatch, LoggedOutcome, LoggedRecord
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.writer import DiskLogWriter
from gradstream.worker.inspect.log_rows import BatchRow, JobRow
from gradstream.worker.inspect.log_source import Following

RUNNER = CliRunner()
A, B = ModelId("s1:train:1"), ModelId("s2:train:1")
LOSS = ForwardBackwardDone(outputs={}, metrics={"loss:sum": 12.5, "num_tokens:sum": 8.0})
STEP = OptimStepDone(metrics={"grad_norm": 0.25})
BROKEN = Failed(code="invalid_request", category="user", message="row 3 is \x1b[31mwrong")


def entry(number: int, owner: ModelId, seq: int, payload: Payload, *, tenant: str = "local") -> LogEntry:
    job = Job(
        future_id=FutureId(f"{owner}:{seq}"),
        owner=owner,
        seq=seq,
        op=codec.op_of(payload),
        tenant=TenantId(tenant),
        payload=codec.encode(payload),
        num_tokens=8,
    )
    return LogEntry(entry_id=f"{number}-0", job=job, at_ms=1_700_000_000_000 + number)


def ended(future_id: str, outcome: Outcome) -> LoggedOutcome:
    data = codec.encode(outcome)
    status = FutureStatus.FAILED if isinstance(outcome, Failed) else FutureStatus.DONE
    return LoggedOutcome(future_id=FutureId(future_id), status=status, digest=codec.digest(data), data=data)


def batch(number: int, kind: str, *outcomes: LoggedOutcome, epoch: int = 1, at_ms: int | None = None) -> LoggedBatch:
    return LoggedBatch(
        epoch=epoch,
        number=number,
        plan=Plan(kind=kind, future_ids=[one.future_id for one in outcomes], row_budget_tokens=512),
        outcomes=list(outcomes),
        cursor=f"{number}-0",
        at_ms=at_ms or 1_700_000_000_000 + 1000 * number,
        elapsed_ms=12.5,
        records=[LoggedRecord(kind=RecordKind.MODEL, record_id=A, fields={"state": "ready"})],
    )


def fill(writer: DiskLogWriter) -> None:
    """A shared batch of two models, a failed one, a step, a job that was cancelled, and one that is open and was begun."""
    writer.append_jobs(
        [
            entry(1, A, 1, forward_backward(8, 5)),
            entry(2, B, 1, forward_backward(6), tenant="other"),
            entry(3, A, 2, forward_backward(4)),
            entry(4, A, 3, optim_step()),
            entry(5, B, 2, optim_step(), tenant="other"),
            entry(6, A, 4, optim_step()),
        ]
    )
    writer.append_started(1, [FutureId(f"{A}:1"), FutureId(f"{B}:1")])
    writer.append_batch(batch(1, "forward_backward", ended(f"{A}:1", LOSS), ended(f"{B}:1", LOSS)))
    writer.append_batch(batch(2, "forward_backward", ended(f"{A}:2", BROKEN)))
    writer.append_batch(batch(3, "optim_step", ended(f"{A}:3", STEP)))
    writer.append_dropped([FutureId(f"{B}:2")])
    writer.append_started(4, [FutureId(f"{A}:4")])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output directory of a server whose gang is gone."""
    writer = open_writer(tmp_path / "out" / "joblog" / "main")
    fill(writer)
    writer.close()
    return tmp_path / "out"


def run(*arguments: str, status: int = 0) -> str:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == status, result.output
    return result.output


def rows(out: Path, *arguments: str) -> list[JobRow]:
    return msgspec.json.decode(run("list", "--output-dir", str(out), "--json", *arguments), type=list[JobRow])


def test_jobs_are_listed_in_the_order_of_their_ends_and_open_ones_last(out: Path):
    listed = [(row.future_id, row.status, row.batch, row.loss) for row in rows(out)]
    assert listed == [
        (f"{A}:1", "done", "1-1", 12.5),
        (f"{B}:1", "done", "1-1", 12.5),
        (f"{A}:2", "failed", "1-2", None),
        (f"{A}:3", "done", "1-3", None),
        (f"{B}:2", "dropped", None, None),
        (f"{A}:4", "open", None, None),
    ]
    first, last = rows(out)[0], rows(out)[-1]
    assert (first.tokens, first.tenant, first.at_ms, first.done_ms) == (
        8,
        "local",
        1_700_000_000_001,
        1_700_000_001_000,
    )
    assert first.digest == codec.digest(codec.encode(LOSS))
    assert (first.epochs, last.epochs) == ([1], [1])
    assert last.op == "optim_step"


@pytest.mark.parametrize(
    ("arguments", "seqs"),
    [
        pytest.param(["--model", A], ["1:1", "1:2", "1:3", "1:4"], id="model"),
        pytest.param(["--tenant", "other"], ["1:1", "1:2"], id="tenant"),
        pytest.param(["--op", "optim_step"], ["1:3", "1:2", "1:4"], id="op"),
        pytest.param(["--failed"], ["1:2"], id="failed"),
        pytest.param(["--open"], ["1:4"], id="open"),
        pytest.param(["--limit", "2"], ["1:2", "1:4"], id="limit"),
        pytest.param(["--since", "2023-11-14T22:13:22"], ["1:2", "1:3"], id="since"),
        pytest.param(["--since", "1m"], [], id="long-ago"),
    ],
)
def test_jobs_can_be_picked_out(out: Path, arguments: list[str], seqs: list[str]):
    assert [row.future_id.split(":", 2)[2] for row in rows(out, *arguments)] == seqs


def test_batches_are_listed_with_their_owners_and_the_sum_of_their_losses(out: Path):
    text = run("list", "--output-dir", str(out), "--json", "--batches")
    first, second, third = msgspec.json.decode(text, type=list[BatchRow])
    assert (first.batch, first.kind, first.num_jobs, first.tokens, first.loss_sum) == (
        "1-1",
        "forward_backward",
        2,
        16,
        25,
    )
    assert (first.owners, first.tenants) == ([A, B], ["local", "other"])
    assert (second.num_failed, second.loss_sum, third.batch) == (1, None, "1-3")
    only = msgspec.json.decode(
        run("list", "--output-dir", str(out), "--json", "--batches", "--model", B), type=list[BatchRow]
    )
    assert [row.batch for row in only] == ["1-1"]


def test_the_tables_hold_what_json_holds_and_no_control_characters_of_others(out: Path):
    text = run("list", "--output-dir", str(out))
    for word in (f"{A}:2", "1-2", "12.5", "failed: invalid_request: row 3", codec.digest(codec.encode(LOSS))[:12]):
        assert word in text
    assert "\x1b" not in text
    assert "25" in run("list", "--output-dir", str(out), "--batches")


def test_a_job_is_shown_with_shapes_settings_plan_and_metrics(out: Path):
    shown = json.loads(run("show", f"{A}:1", "--output-dir", str(out), "--json"))
    assert shown["payload"]["loss_fn"] == "cross_entropy"
    assert (shown["payload"]["tokens"]["dtype"], shown["payload"]["tokens"]["shape"]) == ("int32", "2 x [5..8]")
    assert shown["batch"]["plan"]["future_ids"] == [f"{A}:1", f"{B}:1"]
    assert shown["batch"]["fingerprint"] == "torch=1"
    assert shown["outcome"]["metrics"] == LOSS.metrics
    assert shown["started_as_batch"] == ["1-1"]
    step = json.loads(run("show", f"{A}:3", "--output-dir", str(out), "--json"))
    assert step["payload"]["adam"]["learning_rate"] == 1e-3
    text = run("show", f"{A}:4", "--output-dir", str(out))
    assert "status: open" in text
    assert f"owner: {A}" in text
    assert "ordered: true" in text
    assert "learning_rate: 0.001" in text


def test_a_jobs_body_can_be_written_to_a_file_and_nothing_is_overwritten(out: Path, tmp_path: Path):
    target = tmp_path / "body"
    run("show", f"{A}:1", "--output-dir", str(out), "--payload", str(target))
    assert codec.decode_payload(target.read_bytes()) == forward_backward(8, 5)
    assert "cannot be written" in run("show", f"{A}:1", "--output-dir", str(out), "--payload", str(target), status=2)


def test_a_batch_is_shown_with_its_jobs_and_records(out: Path):
    shown = json.loads(run("show", "1-1", "--output-dir", str(out), "--json"))
    assert [job["future_id"] for job in shown["jobs"]] == [f"{A}:1", f"{B}:1"]
    assert shown["records"] == [{"record": f"model:{A}", "fields": {"state": "ready"}}]
    assert shown["batch"]["plan"]["row_budget_tokens"] == 512


def test_what_is_not_in_the_log_is_one_line_and_status_2(out: Path):
    for what in ("s9:train:1:1", "7-7"):
        assert f"error: {what}: is not in this log" in run("show", what, "--output-dir", str(out), status=2)
    assert run("list", "--output-dir", str(out), "--model", A, "--op", "sample").strip() == "no such jobs"
    assert "--since: 'soon' is not a time" in run("list", "--output-dir", str(out), "--since", "soon", status=2)


@pytest.mark.parametrize("also", [[], ["--batches"], ["--json"]], ids=["jobs", "batches", "json"])
def test_a_model_of_which_the_log_has_nothing_is_an_error_that_names_those_of_which_it_has(out: Path, also: list[str]):
    text = run("list", "--output-dir", str(out), "--model", "s9:train:1", *also, status=2)
    assert text == f"error: --model: no job of s9:train:1 is in this log; there are jobs of {A}, {B}\n"


def test_an_engine_without_a_log_is_an_error_that_names_those_with_one(out: Path):
    text = run("list", "--output-dir", str(out), "--engine", "other", status=2)
    assert f"{out / 'joblog' / 'other'}: there is no job log" in text
    assert text.endswith("there are logs of the engine(s) main: give --engine\n")


def test_a_directory_that_no_server_wrote_to_is_an_error_that_says_what_it_holds(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    text = run("list", "--output-dir", str(tmp_path), status=2)
    assert text == (
        f"error: {tmp_path}: is no output_dir of a server; one holds redis, joblog or snapshots, and here is photos\n"
    )


@pytest.mark.parametrize("content", [b"", b"# a readme, not a log\n" * 40], ids=["empty", "text"])
@pytest.mark.parametrize("command", [["verify"], ["list"], ["show", "1-1"]], ids=["verify", "list", "show"])
def test_a_file_that_is_no_exported_log_is_said_to_be_none(tmp_path: Path, command: list[str], content: bytes):
    file = tmp_path / "README.md"
    file.write_bytes(content)
    text = run(*command, "--file", str(file), status=2)
    assert f"{file}: it does not begin like an exported job log; give a file that `gradstream log export` made" in text
    assert "is a directory" in run(*command, "--file", str(tmp_path), status=2).lower()


def test_an_exported_file_is_read_like_a_log_and_imported_as_one(out: Path, tmp_path: Path):
    file = tmp_path / "bug.gslog"
    assert "4 jobs, 3 batches, 1 of them without all their jobs" in run(
        "export", str(file), "--model", A, "--output-dir", str(out)
    )
    listed = msgspec.json.decode(run("list", "--file", str(file), "--json"), type=list[JobRow])
    assert {row.owner for row in listed} == {A}
    assert "sound: batches 1-1 to 1-3, 3 outcomes" in run("verify", "--file", str(file))
    assert run("import", str(file), str(tmp_path / "there")).strip() == str(tmp_path / "there" / "joblog" / "main")
    assert [row.future_id for row in rows(tmp_path / "there")] == [row.future_id for row in listed]
    assert "is there already" in run("export", str(file), "--output-dir", str(out), status=2)
    assert "holds a log already" in run("import", str(file), str(tmp_path / "there"), status=2)
    whole = tmp_path / "whole.gslog"
    run("export", str(whole), "--model", A, "--with-neighbours", "--stop", "1-2", "--output-dir", str(out))
    assert "sound: batches 1-1 to 1-2, 3 outcomes" in run("verify", "--file", str(whole))
    assert "--stop: '7' is not a batch" in run(
        "export", str(tmp_path / "x"), "--stop", "7", "--output-dir", str(out), status=2
    )


def damage(out: Path, number: int) -> tuple[Path, int]:
    """Change a byte of the batch of this number; its segment and where it stands."""
    path = last_segment(out / "joblog" / "main")
    data = bytearray(path.read_bytes())
    position = next(
        at for at, frame in DiskLog(path.parent).scan() if isinstance(frame, LoggedBatch) and frame.number == number
    )
    data[position.offset + 20] ^= 1
    path.write_bytes(bytes(data))
    return path, position.offset


def test_a_sound_log_has_status_0_and_a_damaged_one_1(out: Path):
    report = json.loads(run("verify", "--output-dir", str(out), "--json"))
    assert (report["is_sound"], report["first"], report["last"], report["num_outcomes"]) == (True, "1-1", "1-3", 4)
    damage(out, 2)
    assert "1 problem(s)" in run("verify", "--output-dir", str(out), status=1)


def test_a_damaged_frame_is_stepped_over_and_said_in_one_line_with_status_2(out: Path):
    path, offset = damage(out, 2)
    result = RUNNER.invoke(app, ["list", "--output-dir", str(out), "--json"])
    listed = msgspec.json.decode(result.stdout, type=list[JobRow])
    assert result.exit_code == 2
    assert [(row.future_id, row.status) for row in listed if row.owner == A] == [
        (f"{A}:1", "done"),
        (f"{A}:3", "done"),
        (f"{A}:2", "open"),
        (f"{A}:4", "open"),
    ]
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: skipped what does not read: {path.name} at byte {offset} (")
    assert line.endswith("; jobs that ended there are shown as open")


def test_what_lies_behind_damage_is_shown_and_what_it_took_is_not(out: Path):
    path, offset = damage(out, 2)
    text = run("show", "1-3", "--output-dir", str(out), status=2)
    assert f"{A}:3" in text
    assert f"{path.name} at byte {offset}" in text
    assert "1-2: is not in what reads of this log; skipped" in run("show", "1-2", "--output-dir", str(out), status=2)


def test_a_damaged_log_is_exported_without_what_does_not_read(out: Path, tmp_path: Path):
    path, offset = damage(out, 2)
    file = tmp_path / "rest.gslog"
    text = run("export", str(file), "--output-dir", str(out), status=2)
    assert "6 jobs, 2 batches" in text or "5 jobs, 2 batches" in text
    assert f"skipped what does not read: {path.name} at byte {offset}" in text
    assert "sound: batches 1-1 to 1-3, 3 outcomes" in run("verify", "--file", str(file))


@pytest.mark.parametrize("how", ["gone", "head", "cut"])
def test_a_damaged_segment_is_stepped_over(tmp_path: Path, how: str):
    directory = tmp_path / "joblog" / "main"
    writer = open_writer(directory, segment_bytes=1)
    for number in range(1, 5):
        writer.append_jobs([entry(number, A, number, optim_step())])
        writer.append_batch(batch(number, "optim_step", ended(f"{A}:{number}", STEP)))
    writer.close()
    position = next(
        at for at, frame in DiskLog(directory).scan() if isinstance(frame, LoggedBatch) and frame.number == 2
    )
    path = directory / position.segment
    match how:
        case "gone":
            path.unlink()
        case "head":
            path.write_bytes(bytes(10) + path.read_bytes()[10:])
        case _:
            path.write_bytes(path.read_bytes()[: position.offset])
    result = RUNNER.invoke(app, ["list", "--output-dir", str(tmp_path), "--json"])
    assert result.exit_code == 2
    listed = msgspec.json.decode(result.stdout, type=list[JobRow])
    assert [row.batch for row in listed if row.status == "done"] == ["1-1", "1-3", "1-4"]
    (line,) = result.stderr.splitlines()
    assert path.name in line


def test_following_gives_each_job_once_also_when_a_successor_voids_what_was_seen(tmp_path: Path):
    writer = open_writer(tmp_path)
    writer.append_jobs([entry(1, A, 1, optim_step()), entry(2, A, 2, optim_step())])
    restarts: list[int] = []
    following = Following(DiskLog(tmp_path), on_restart=lambda: restarts.append(1))

    def news() -> list[str]:
        return [str(frame.batch_id) for frame, is_new in following.new() if is_new and isinstance(frame, LoggedBatch)]

    assert news() == []
    writer.append_batch(batch(1, "optim_step", ended(f"{A}:1", STEP)))
    assert (news(), news()) == (["1-1"], [])
    successor = succeed(tmp_path)
    # The first writer has lost its lease; what it still writes does not count.
    writer.append_batch(batch(2, "optim_step", ended(f"{A}:2", STEP)))
    assert news() == []
    successor.append_batch(batch(1, "optim_step", ended(f"{A}:2", STEP), epoch=2))
    assert (news(), restarts) == (["2-1"], [])
    writer.close()
    successor.close()


def test_a_follower_that_saw_what_does_not_count_any_more_reads_again_and_repeats_nothing(tmp_path: Path):
    writer = open_writer(tmp_path)
    writer.append_batch(batch(1, "optim_step", ended(f"{A}:1", STEP)))
    tail = DiskLog(tmp_path).tail()
    restarts: list[int] = []
    following = Following(DiskLog(tmp_path), on_restart=lambda: restarts.append(1))
    writer.append_batch(batch(2, "optim_step", ended(f"{A}:2", STEP)))
    writer.append_batch(batch(3, "optim_step", ended(f"{A}:3", STEP)))
    assert len(list(following.new())) == 4
    successor = open_writer(tmp_path, epoch=2, after=tail.end)
    successor.append_batch(batch(1, "optim_step", ended(f"{A}:2", STEP), epoch=2))
    found = [(frame, is_new) for frame, is_new in following.new() if isinstance(frame, LoggedBatch)]
    assert [(str(frame.batch_id), is_new) for frame, is_new in found] == [("1-1", False), ("2-1", True)]
    assert restarts == [1]
    writer.close()
    successor.close()


def test_the_command_prints_jobs_as_they_end(tmp_path: Path):
    writer = open_writer(tmp_path / "joblog" / "main")
    fill(writer)
    command = [Path(sys.executable).with_name("gradstream"), "log", "follow", "--output-dir", str(tmp_path), "--json"]
    arguments = ["--every", "0.05", "--tail", "2", "--model", A]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(240, process.kill)
        limit.start()
        assert process.stdout is not None
        seen = [msgspec.json.decode(process.stdout.readline(), type=JobRow).future_id for _ in range(2)]
        writer.append_batch(batch(4, "optim_step", ended(f"{A}:4", STEP)))
        last = msgspec.json.decode(process.stdout.readline(), type=JobRow)
        process.terminate()
        limit.cancel()
    writer.close()
    assert seen == [f"{A}:2", f"{A}:3"]
    assert (last.future_id, last.tokens, last.batch) == (f"{A}:4", 8, "1-4")
