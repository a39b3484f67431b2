"""The loop of every rank but 0: receive a message, do what it says."""

from gradstream.shared.wire import Batch
from gradstream.worker.control import Control, Idle, Stop
from gradstream.worker.execute import Executor, execute


def follow(control: Control, engine: Executor) -> None:
    """Run batches until rank 0 says stop. What kills the op on rank 0 propagates here too and ends this rank."""
    while True:
        match control.receive():
            case Batch() as batch:
                execute(engine, batch)
            case Idle():
                continue
            case Stop():
                return
