"""A process that ends with the one that started it."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send signal_number to this process when its parent ends (Linux; elsewhere nothing is asked).

    A rank calls this first thing, so that a torchrun that was killed leaves no rank behind.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)
