"""Runs a function again and again in forks of one process, each killed at a later touch of the file system.

The interpreter's audit events are the instants: every open, mkdir, rename, chmod, unlink, rmdir and listing, before it happens.
"""

import os
import signal
import sys
from collections.abc import Callable

_EVENTS = ("open", "os.", "shutil.", "tempfile.")


def survive_from(instant: int, work: Callable[[], None]) -> bool:
    """Run work in a fork that kills itself with SIGKILL at its instant-th event; True when it ended before."""
    child = os.fork()
    if child == 0:
        left = instant

        def on_event(event: str, _arguments: object) -> None:
            nonlocal left
            if event.startswith(_EVENTS):
                left -= 1
                # os.kill is an event itself.
                if left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True
