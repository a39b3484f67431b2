"""Files of full-weight checkpoints: what a format has to do, and the tensors that every format holds under the same names.

`model.NAME` is a parameter by its name in the Hugging Face model, `optim.PART.NAME` its share of one of the optimizer's tensors, `step` the
number of updates made.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gradstream.engine.registry import Registry

MODEL = "model."
OPTIM = "optim."
STEP = "step"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file that was not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Reader(Protocol):
    """The open files of a checkpoint. A checkpoint that is deleted meanwhile can still be read."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """What there is, by name."""

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Copy tensors into targets of the same shape, one after the other, in the target's dtype. Raises OSError, RuntimeError."""

    def close(self) -> None:
        """Let go of the files. Idempotent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """write: tensors, on any device, into an empty directory, one after the other; equal tensors make equal files; raises OSError.

    open: the files of a directory whose digests were checked; raises StorageFailure when they are not of this format.
    bytes_per_tensor: an upper bound of what a file takes beside a tensor's values, if its name has under 150 characters.
    """

    write: Callable[[Path, Mapping[str, Tensor]], None]
    open: Callable[[Path], Reader]
    bytes_per_tensor: int


FORMATS: Registry[str, Format] = Registry("format of checkpoints")


@contextmanager
def system_errors() -> Iterator[None]:
    """Let an OSError of the block out as it is, whatever torch wrapped it into."""
    try:
        yield
    except (RuntimeError, CheckpointException) as error:
        if (found := _system_error(error)) is not None:
            raise found from error
        raise


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        if isinstance(error, CheckpointException):
            for wrapped, _ in error.failures.values():
                if (found := _system_error(wrapped)) is not None:
                    return found
        error = error.__cause__ or error.__context__
    return None
