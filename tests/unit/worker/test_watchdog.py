"""Operations that hang."""

from gradstream.shared.clock import ManualClock
from gradstream.worker.watchdog import Watchdog


def test_only_an_overdue_operation_is_called_hung():
    clock, hung = ManualClock(), []
    watchdog = Watchdog(timeout_s=60, clock=clock, on_hung=hung.append)
    with watchdog.watch("optim_step"):
        clock.advance(59)
        watchdog.check()
    clock.advance(100)
    watchdog.check()
    assert hung == []
    with watchdog.watch("save_weights"):
        clock.advance(61)
        watchdog.check()
    assert hung == ["save_weights"]
