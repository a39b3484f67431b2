"""A supervised child: real processes that crash, hang, refuse and ignore signals."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tests.support.launched import has_ended
from tests.support.polling import wait_until

from gradstream.shared.clock import ManualClock, SystemClock
from gradstream.worker.supervise import ChildSpec, ConfigFailure, RestartPolicy, Supervised

READY = "import sys, os, signal, time; print('up', os.getpid(), flush=True); "
SLEEP = READY + "time.sleep(600)"


@contextmanager
def supervised(folder: Path, code: str, **policy: float | None) -> Iterator[Supervised]:
    spec = ChildSpec(name="child", argv=[sys.executable, "-c", code], log_file=folder / "logs" / "child.log")
    rules = RestartPolicy(**{"first_pause_s": 0.01, "longest_pause_s": 0.05, **policy})
    child = Supervised(spec, policy=rules, clock=SystemClock())
    child.start()
    try:
        yield child
    finally:
        child.request_stop()
        child.finish(timeout_s=0.5)


def said(child: Supervised, word: str) -> bool:
    return word in child.spec.log_file.read_text()


def test_a_child_that_crashes_is_started_again_and_keeps_its_log(tmp_path: Path) -> None:
    with supervised(tmp_path, READY + "sys.exit('boom')") as child:
        wait_until(lambda: child.check() or child.num_starts >= 3)
        wait_until(lambda: (child.check(), child.num_starts >= 3)[1])
        assert child.num_failures >= 2
        assert child.spec.log_file.read_text().count("boom") >= 2


def test_a_child_that_ends_well_unasked_is_started_again_too(tmp_path: Path) -> None:
    with supervised(tmp_path, READY) as child:
        wait_until(lambda: (child.check(), child.num_starts >= 2)[1])


def test_a_child_killed_by_a_signal_is_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path, SLEEP) as child:
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: (child.check(), child.pid not in (None, first))[1])


def test_a_config_failure_is_not_tried_again_and_says_what_the_child_said(tmp_path: Path) -> None:
    def ends(child: Supervised) -> bool:
        child.check()
        return False

    code = READY + "print('model_path: no such model', file=sys.stderr); sys.exit(78)"
    with supervised(tmp_path, code) as child:
        with pytest.raises(ConfigFailure, match="model_path: no such model"):
            wait_until(lambda: ends(child))
        assert child.check() is False
        assert child.num_starts == 1


def test_a_child_that_ignores_sigterm_is_killed_after_the_wait(tmp_path: Path) -> None:
    with supervised(tmp_path, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP) as child:
        wait_until(lambda: said(child, "up"))
        child.request_stop()
        child.finish(timeout_s=0.2)
        assert child.pid is None
        assert child.check() is False
        assert child.num_starts == 1


def test_a_child_stops_at_its_own_pace_when_asked(tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0))); "
        + SLEEP
    )
    with supervised(tmp_path, code) as child:
        wait_until(lambda: said(child, "up"))
        child.request_stop()
        child.finish(timeout_s=240)
        assert said(child, "bye")


def test_helpers_of_a_dead_child_do_not_outlive_it(tmp_path: Path) -> None:
    code = (
        READY
        + "import subprocess; p = subprocess.Popen(['sleep', '600']); print('helper', p.pid, flush=True); os._exit(1)"
    )
    with supervised(tmp_path, code, first_pause_s=60.0, longest_pause_s=60.0) as child:
        wait_until(child.check)
        helper = int(child.spec.log_file.read_text().split("helper")[1].split()[0])
        wait_until(lambda: has_ended(helper))


def test_a_hanging_child_can_be_restarted(tmp_path: Path) -> None:
    with supervised(tmp_path, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP) as child:
        wait_until(lambda: said(child, "up"))
        child.restart(timeout_s=0.2)
        wait_until(lambda: (child.check(), child.num_starts == 2)[1])
        assert child.num_failures == 1


def test_a_child_is_asked_to_stop_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    supervisor = (
        "import sys, time; from pathlib import Path; from gradstream.shared.clock import SystemClock;"
        "from gradstream.worker.supervise import *;"
        f"spec = ChildSpec(name='c', argv=[sys.executable, '-c', {SLEEP!r}], log_file=Path({str(log)!r}));"
        "Supervised(spec, policy=RestartPolicy(), clock=SystemClock()).start(); time.sleep(600)"
    )
    process = psutil.Popen([sys.executable, "-c", supervisor])
    try:
        wait_until(lambda: log.exists() and "up" in log.read_text())
        child = int(log.read_text().split()[1])
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: has_ended(child))


@pytest.mark.config_field("restart_backoff_s", "max_restart_backoff_s")
def test_pauses_double_up_to_the_longest() -> None:
    policy = RestartPolicy(first_pause_s=0.5, longest_pause_s=5.0)
    assert [policy.pause_s(n) for n in (1, 2, 3, 4, 5, 1000)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("healthy_after_s", "num_failures"), [(60.0, 1), (None, 2)], ids=["age-counts", "only-progress-counts"]
)
def test_a_long_life_forgives_earlier_failures_only_where_age_is_health(
    tmp_path: Path, healthy_after_s: float | None, num_failures: int
) -> None:
    clock = ManualClock()
    spec = ChildSpec(name="child", argv=[sys.executable, "-c", SLEEP], log_file=tmp_path / "child.log")
    child = Supervised(spec, policy=RestartPolicy(healthy_after_s=healthy_after_s), clock=clock)
    child.start()
    for _ in range(2):
        clock.advance(100.0)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        wait_until(child.check)
        clock.advance(100.0)
        child.check()
    assert child.num_failures == num_failures
    child.note_progress()
    assert child.num_failures == 0
    child.request_stop()
    child.finish(timeout_s=5)
