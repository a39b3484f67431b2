"""The C allocator's habits, for a process that takes and drops blocks of megabytes."""

import ctypes
import sys

# Of mallopt, in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# glibc takes no more than this as the size from which a block is mapped by itself.
_MAX_MMAP_THRESHOLD_BYTES = 32 * 1024 * 1024
# Freed memory that each arena keeps.
_KEPT_BYTES = 64 * 1024 * 1024
# One for the thread that has the most to do, and one for the threads beside it; by default each thread would have its own, and keep as much.
_NUM_ARENAS = 2


def keep_freed_memory() -> None:
    """Let freed blocks of megabytes be used again instead of going back to the kernel; nothing where the C library is not glibc.

    A body's bytes are copied some times on their way, and a pass on a CPU makes and drops tensors of megabytes all the time. With
    glibc's defaults each of these gets fresh pages, and a page's first touch takes longer than the copy of what is in it.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_ARENA_MAX, _NUM_ARENAS)
