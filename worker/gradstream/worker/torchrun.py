"""torchrun with the ranks' exit code as its own: `python -m gradstream.worker.torchrun TORCHRUN_ARGUMENTS`."""

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as run

from gradstream.worker.parent import end_with_parent


def main(arguments: Sequence[str]) -> int:
    """Run the gang; 0 when all ranks ended well or a signal stopped them, the first failed rank's exit code otherwise.

    torchrun itself answers 1 for every failure, which hides the difference between a mistake in the config and a crash.
    A rank that a signal killed counts as 1.
    """
    try:
        run(list(arguments))
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
