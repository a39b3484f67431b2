"""torchrun with the ranks' exit code as its own: `python -m gradstream.worker.torchrun TORCHRUN_ARGUMENTS`."""

import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as run

from gradstream.worker.meeting import meeting_place
from gradstream.worker.parent import end_with_parent

_GRACE_S = 3


def main(arguments: Sequence[str]) -> int:
    """Run the gang; 0 when all ranks ended well or a signal stopped them, the first failed rank's exit code otherwise.

    torchrun itself answers 1 for every failure, which hides the difference between a mistake in the config and a crash.
    A rank that a signal killed counts as 1.
    """
    _kill_soon()
    with meeting_place() as folder:
        return _run(_meeting_in_files(arguments, folder))


def _kill_soon() -> None:
    """Have torchrun kill the other ranks _GRACE_S after one failed; it waits 30 s, and has no option for it.

    One that stands still hears no signal, and what the others were doing is repeated by the next gang in any case. How long ranks
    have after a stop that was asked for is another matter: TORCH_ELASTIC_SHUTDOWN_TIMEOUT.
    """
    close = PContext.close

    def close_soon(context: PContext, death_sig: signal.Signals | None = None, timeout: int = _GRACE_S) -> None:
        close(context, death_sig, timeout)

    PContext.close = close_soon  # type: ignore[method-assign, assignment]


def _meeting_in_files(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments with --standalone replaced by a rendezvous in files that only this user can open.

    torchrun's own standalone store listens on every interface, asks nobody who they are, and unpickles what it finds.
    """
    if "--standalone" not in arguments:
        return list(arguments)
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(folder / "rendezvous")]
    rendezvous += ["--rdzv-conf", "store_type=file", "--rdzv-id", uuid.uuid4().hex, "--log-dir", str(folder / "logs")]
    others = [argument for argument in arguments if argument != "--standalone"]
    # What follows the program's name is for the ranks.
    return [*rendezvous, *others, "--meet", str(folder / "ranks")]


def _run(arguments: list[str]) -> int:
    try:
        run(arguments)
    except SignalException:
        return 0
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    # A killed launcher takes the queue with it: there is nothing left to stop for in order.
    end_with_parent()
    sys.exit(main(sys.argv[1:]))
