"""A device without room for a job, as that job's own failure."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradstream.engine.parallel.comm import Comm
from gradstream.shared.errors import OutOfMemory


@contextmanager
def memory_as_failure(comm: Comm, *, what: str) -> Iterator[None]:
    """Raise OutOfMemory, naming the work by what, in the place of torch's error; the caller puts back what the work had changed.

    With several ranks torch's own error goes on and ends the process: the other ranks wait for this one in a collective.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if comm.size > 1:
            raise
        reason = str(error).strip().partition(". ")[0]
        raise OutOfMemory(
            f"{what}: the device has no room for it, and nothing was changed ({reason}); send fewer or shorter datums, or start the server "
            "with a smaller sample_packing_sequence_len, enable_gradient_checkpointing or enable_activation_offload"
        ) from None
