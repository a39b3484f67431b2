"""What the allocator of host memory refuses fails a job like what a device's refuses."""

import pytest
import torch

from gradstream.engine.memory import memory_as_failure
from gradstream.engine.parallel.comm import Comm
from gradstream.shared.errors import OutOfMemory


def test_a_refusal_of_the_host_is_a_jobs_failure() -> None:
    with (
        pytest.raises(
            OutOfMemory, match=r"^forward: the device has no room for it, and nothing was changed \(.*allocate memory"
        ),
        memory_as_failure(Comm.single(), what="forward"),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_numpy_and_python_are_heard_too() -> None:
    with pytest.raises(OutOfMemory), memory_as_failure(Comm.single(), what="forward"):
        raise MemoryError


def test_another_error_ends_the_process() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_as_failure(Comm.single(), what="forward"):
        torch.zeros(2).view(3)
