"""Exports from the request to the files: a real API, the queue, a worker that forks, and a model that loads without us."""

import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import redis
import torch
from tests.support.adapters import CPU, forward_logits, noisy_adapter, save_adapter
from tests.support.api_server import api_server
from tests.support.cards import UNIFORM_CARD
from tests.support.echo_worker import echo_worker
from tests.support.gang import TINY, output_dir, settings_file
from tests.support.launched import all_gone
from tests.support.rig import LIMITS
from tests.support.rq_worker import work_off
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gradstream.api.config import ApiConfig
from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.models.build import load_base
from gradstream.shared.clock import ManualClock, SystemClock
from gradstream.shared.config import read_handover
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.port import RecordKind
from gradstream.worker.cli import app
from gradstream.worker.collect import SETTLED_S
from gradstream.worker.export_queue import MAX_STARTS, export_queue
from gradstream.worker.housekeeping import TASKS, ExportOrders, Task, enqueue, queue_for
from gradstream.worker.records import checkpoint_fields

URI = "tinker://s1:train:0/weights/a"
TOKENS = torch.arange(40, 60)
DEADLINE_S = 120.0
pytestmark = [pytest.mark.slow]


class House:
    """One server without a gang: a checkpoint, the API, and exports made when the test says so."""

    def __init__(self, settings: Path, http: httpx.Client) -> None:
        read = read_handover(settings)
        self.settings, self.http = settings, http
        self.clock = ManualClock(wall_ms=SystemClock().wall_ms())
        self.url, self.engine = str(read.redis_url), read.engine_name
        self.output_dir = output_dir(settings)
        self.base = load_base(TINY, device=CPU, dtype=torch.float32)
        self.adapter = noisy_adapter(self.base)
        self.save()

    def save(self, *, overwrite: bool = False) -> None:
        # Saves of one name are told apart by their times.
        self.clock.advance(1)
        order = SaveOrder(location=parse_uri(URI), job=FutureId("s1:train:0:1"), base_model="tiny", overwrite=overwrite)
        manifest = save_adapter(self.adapter, order, self.output_dir, clock=self.clock)
        connection = redis.Redis.from_url(self.url)
        fields = {**checkpoint_fields(manifest), "tenant": "local"}
        connection.hset(f"gs:{{{self.engine}}}:checkpoint:{URI}", mapping=fields)
        connection.close()

    def ask(self, **fields: object) -> dict:
        answer = self.http.post("/api/v1/gradstream/exports", json={"path": URI, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def state(self, export: str) -> dict:
        return self.http.get(f"/api/v1/gradstream/exports/{export}").raise_for_status().json()

    def put(self) -> int:
        """What housekeeping does at every tick."""
        connection = redis.Redis.from_url(self.url)
        queue = export_queue(self.engine, connection)
        put = ExportOrders(queue, url=self.url, engine=self.engine, settings_file=self.settings).put()
        connection.close()
        return put

    def until(self, export: str, *states: str) -> dict:
        deadline = time.monotonic() + DEADLINE_S
        while (seen := self.state(export))["state"] not in states:
            assert time.monotonic() < deadline, seen
            time.sleep(0.02)
        return seen

    def sweep(self) -> None:
        connection = redis.Redis.from_url(self.url)
        (task,) = (task for task in TASKS if task.name == "sweep_files")
        run(task, queue_for(self.engine, connection), self.settings)
        connection.close()

    def change(self, export: str, **fields: str) -> None:
        with RedisCensus(self.url, engine=self.engine) as census:
            assert census.change(RecordKind.EXPORT, export, fields)


def run(task: Task, queue, settings: Path) -> None:
    assert enqueue(queue, task, settings_file=settings, tick_ms=SystemClock().wall_ms(), awake_ms=0)
    work_off(queue)
    assert queue.failed_job_registry.get_job_ids() == []


@pytest.fixture
def house(tmp_path: Path, redis_url: str, engine_name: str) -> Iterator[House]:
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name)
    config = ApiConfig(output_dir=output_dir(settings))
    with (
        # While nobody leads, nothing is known not to exist.
        echo_worker(redis_url, engine=engine_name, card=UNIFORM_CARD),
        api_server(redis_url, engine=engine_name, config=config, limits=LIMITS) as base_url,
        httpx.Client(base_url=base_url, timeout=30) as http,
    ):
        yield House(settings, http)


@contextmanager
def exporter(settings: Path) -> Iterator[psutil.Process]:
    """The process that makes exports."""
    command = [sys.executable, "-m", "gradstream.worker.exporter", "--settings", str(settings)]
    with settings.with_name("exports.log").open("ab") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@contextmanager
def ticking(house: House) -> Iterator[None]:
    """Housekeeping's ticks, faster."""
    closing = threading.Event()

    def tick() -> None:
        while not closing.wait(0.2):
            house.put()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def horse(parent: psutil.Process) -> psutil.Process:
    deadline = time.monotonic() + DEADLINE_S
    while not (children := parent.children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return children[0]


def test_the_exported_directory_is_a_model_with_the_logits_of_base_and_adapter(house, tmp_path):
    export = house.ask()["export_id"]
    assert house.put() == 1
    assert house.put() == 0
    with exporter(house.settings):
        done = house.until(export, "done", "failed")
    assert (done["state"], done["progress"], done["error"]) == ("done", 1.0, None)
    links = house.http.get(f"/api/v1/gradstream/exports/{export}/urls").raise_for_status().json()
    tar = httpx.get(links["archive"]).raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(tmp_path / "fetched", filter="data")
    one = httpx.get(links["urls"]["config.json"]).raise_for_status().content
    assert (tmp_path / "fetched" / "config.json").read_bytes() == one
    sizes = [path.stat().st_size for path in (house.output_dir / done["directory"]).iterdir()]
    assert done["size_bytes"] == sum(sizes)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fetched", dtype=torch.float32)
        logits = model(TOKENS[None]).logits[0]
    expected = forward_logits(house.base, TOKENS, house.adapter)
    # The stored model has the base model's dtype.
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "fetched").dtype
    torch.testing.assert_close(logits, expected, atol=5e-5 if stored == torch.float32 else 0.15, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "fetched").vocab_size > 0
    assert house.ask()["state"] == "done"


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "adapter"])
def test_the_command_fetches_an_export_into_a_directory(house, tmp_path, merged):
    arguments = [URI, "--out", str(tmp_path / "got"), "--base-url", str(house.http.base_url)]
    with exporter(house.settings), ticking(house):
        result = CliRunner().invoke(app, ["export", *arguments, *(["--merged"] if merged else [])])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "got")
    names = {path.name for path in (tmp_path / "got").iterdir()}
    expected = {"config.json", "model.safetensors"} if merged else {"adapter_config.json", "adapter_model.safetensors"}
    assert expected <= names


def test_the_command_says_what_is_wrong_and_writes_nothing(house, tmp_path):
    where = ["--out", str(tmp_path / "got"), "--base-url", str(house.http.base_url), "--merged"]
    result = CliRunner().invoke(app, ["export", "tinker://s1:train:0/weights/none", *where])
    assert result.exit_code == 2
    assert "there is no checkpoint" in result.output
    assert not (tmp_path / "got").exists()


def test_an_export_whose_process_is_killed_is_made_whole_by_the_next(house):
    export = house.ask()["export_id"]
    house.put()
    with exporter(house.settings) as worker:
        victim = horse(worker)
        house.until(export, "running", "done")
        # It may have been faster.
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        deadline = time.monotonic() + DEADLINE_S
        while house.state(export)["state"] != "done":
            house.put()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    names = [path.name for path in (house.output_dir / "exports").iterdir()]
    assert [name for name in names if name.startswith(".")] == []
    AutoModelForCausalLM.from_pretrained(house.output_dir / house.state(export)["directory"])


def cut_off(house: House) -> str:
    """An export that was begun, and not done when its worker was killed, the child gone too."""
    for _ in range(50):
        export = house.ask()["export_id"]
        house.put()
        with exporter(house.settings) as worker:
            victim = horse(worker)
            house.until(export, "running", "done")
            worker.kill()
            assert all_gone([victim])
        if house.state(export)["state"] == "running":
            return export
        # It was faster than the kill. The next one is of another save.
        house.save(overwrite=True)
    raise AssertionError("every one of 50 exports was faster than the kill that was meant for it")


def test_a_killed_worker_takes_its_child_with_it_and_the_next_one_makes_the_export_at_once(house):
    export = cut_off(house)
    # What a child that was killed in the middle of writing leaves.
    draft = house.output_dir / "exports" / f".{export.replace(':', '+')}.x.tmp"
    draft.mkdir(parents=True)
    with exporter(house.settings):
        deadline = time.monotonic() + DEADLINE_S
        while house.state(export)["state"] != "done":
            house.put()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not draft.exists()


def test_an_export_that_never_comes_to_an_end_is_given_up_and_can_be_asked_for_again(house):
    export = house.ask()["export_id"]
    house.change(export, num_starts=str(MAX_STARTS), state="running")
    assert house.put() == 0
    failed = house.state(export)
    assert failed["state"] == "failed"
    assert f"started {MAX_STARTS} times" in failed["error"]
    assert house.ask()["state"] == "waiting"
    assert house.put() == 1


def test_an_export_that_does_not_fit_fails_with_the_numbers_and_writes_nothing(tmp_path, redis_url, engine_name):
    limit = "2MB"
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, storage_limit=limit)
    config = ApiConfig(output_dir=output_dir(settings))
    with (
        api_server(redis_url, engine=engine_name, config=config, limits=LIMITS) as base_url,
        httpx.Client(base_url=base_url, timeout=30) as http,
    ):
        house = House(settings, http)
        (house.output_dir / "filler").write_bytes(bytes(1_900_000))
        export = house.ask()["export_id"]
        house.put()
        with exporter(settings):
            failed = house.until(export, "done", "failed")
    assert failed["state"] == "failed"
    assert "storage_limit" in failed["error"]
    assert list(house.output_dir.glob("exports/*")) == []


def test_an_export_of_a_save_that_was_replaced_says_so(house):
    export = house.ask()["export_id"]
    house.save(overwrite=True)
    house.put()
    with exporter(house.settings):
        failed = house.until(export, "done", "failed")
    assert "replaced" in failed["error"]
    assert house.ask()["export_id"] != export


def test_exports_past_their_time_and_deleted_ones_leave_the_disk(house):
    export = house.ask()["export_id"]
    house.put()
    with exporter(house.settings):
        done = house.until(export, "done", "failed")
    directory = house.output_dir / done["directory"]
    house.sweep()
    assert directory.exists()
    assert house.http.delete(f"/api/v1/gradstream/exports/{export}").status_code == 204
    assert house.http.get(f"/api/v1/gradstream/exports/{export}").status_code == 404
    old_s = time.time() - SETTLED_S - 60
    os.utime(directory, (old_s, old_s))
    house.sweep()
    assert not directory.exists()
    again = house.ask()["export_id"]
    house.change(again, expires_ms="1")
    house.sweep()
    assert house.http.get("/api/v1/gradstream/exports").json() == {"exports": [], "total_count": 0}
    assert house.put() == 0
