"""A device without room for a job, as that job's own failure."""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import structlog
import torch

from gradstream.engine.parallel.comm import Comm
from gradstream.shared.errors import OutOfMemory

_log = structlog.get_logger(__name__)

# What torch's allocator for host memory calls itself in its errors, which have no class of their own.
_NO_HOST_MEMORY = "DefaultCPUAllocator"
_FEWER = (
    "send fewer or shorter datums, or start the server with a smaller sample_packing_sequence_len, enable_gradient_checkpointing or "
    "enable_activation_offload"
)
_FEWER_ADAPTERS = "start the server with a smaller max_active_adapters or max_lora_rank"


@contextmanager
def memory_as_failure(comm: Comm, *, what: str, help_: str = _FEWER) -> Iterator[None]:
    """Raise OutOfMemory, naming the work by what, in the place of torch's error; the caller puts back what the work had changed.

    Collective at the end of the block, in which nothing else may be: a rank that had no room tells the others, and all of them
    raise. Whatever else the block raises ends the process, and so the other ranks' wait. help_: what may help.
    """
    reason = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = lack_of_room(error, what=what)
    if _is_anywhere(comm, reason is not None):
        raise no_room(what=what, reason="on another rank" if reason is None else reason, help_=help_)


def room_for_adapter(comm: Comm, *, what: str) -> AbstractContextManager[None]:
    """The same for an adapter that comes to the device."""
    return memory_as_failure(comm, what=what, help_=_FEWER_ADAPTERS)


def lack_of_room(error: RuntimeError | MemoryError, *, what: str) -> str:
    """Why the device had no room for work; raises the error when it is about anything else. The tensors of its frames are let go."""
    reason = _first_sentence(error)
    if reason is None:
        raise error
    _log.info("no_room_on_device", what=what, reason=reason, where=_where(error))
    # Its frames hold the tensors of the work, for as long as anybody holds the error.
    error.__traceback__ = None
    return reason


def is_lack_of_room(error: RuntimeError | MemoryError) -> bool:
    """True when it is about memory that there was not."""
    return _first_sentence(error) is not None


def no_room(*, what: str, reason: str, help_: str) -> OutOfMemory:
    """The failure of a job for which the device has no room."""
    return OutOfMemory(f"{what}: the device has no room for it, and nothing was changed ({reason}); {help_}")


def _first_sentence(error: RuntimeError | MemoryError) -> str | None:
    """The first sentence of an error for want of memory; None for another error."""
    text = str(error).strip() or type(error).__name__
    _, name, said = text.partition(_NO_HOST_MEMORY)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return text.partition(". ")[0]
    return f"{name}{said}".partition(". ")[0] if name else None


def _where(error: BaseException) -> str:
    """The innermost function that the error came through."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else ""


def _is_anywhere(comm: Comm, is_here: bool) -> bool:
    if comm.size == 1:
        return is_here
    # On the CPU: a device without room may have none for this either.
    flag = torch.tensor([int(is_here)])
    return bool(comm.all_reduce_sum_(flag).item())
