"""Replaces itself by a program that dies with its parent. Run as a file: child.py PARENT_PID PROGRAM [ARGUMENT ...].

A fresh interpreter does this instead of a hook between fork and exec, which is unsafe in a process with threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for SIGTERM at the parent's death (Linux; elsewhere nothing is asked), then become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # The parent may have died before the request was in place.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(program, sys.argv[2:])  # noqa: S606  the binary that find_binary chose


if __name__ == "__main__":
    main()
