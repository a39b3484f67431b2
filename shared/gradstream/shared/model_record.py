"""What a model's record says of the model. The job log's scripts write and read the same words."""

from collections.abc import Mapping
from enum import StrEnum


class ModelState(StrEnum):
    """creating: its first job waits or runs. ready: the gang holds it. failed: it was never made. lost: its state could not be brought
    back. unloaded: it was dropped, or is there for its checkpoints alone.
    """

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    LOST = "lost"
    UNLOADED = "unloaded"


class Dialect(StrEnum):
    """Of the API that a model was made by. tinker is written into no record: it is what is meant where none stands."""

    TINKER = "tinker"
    XORL = "xorl"


# A model in one of these takes jobs.
OPEN_STATES = frozenset({ModelState.CREATING, ModelState.READY})
# A model in one of these takes no more training, and its state is gone without having been dropped on purpose.
BROKEN_STATES = frozenset({ModelState.FAILED, ModelState.LOST})
_GONE = "gone"


def dialect_of(record: Mapping[str, str]) -> Dialect:
    """Whose client made the model. The server itself numbers the jobs of xorl's, which their clients named."""
    return Dialect(record.get("dialect") or Dialect.TINKER)


def is_over(record: Mapping[str, str]) -> bool:
    """True when everything that the model has accepted ends with its unload, whether or not that was executed yet."""
    tail = record.get("tail")
    return tail == _GONE or (not tail and record.get("state") == ModelState.UNLOADED)


def is_unloading(record: Mapping[str, str]) -> bool:
    """True when the last job that a model of the xorl dialect has accepted is its unload."""
    return record.get("tail") == _GONE


def num_open_jobs(record: Mapping[str, str]) -> int:
    """Jobs that were accepted and are not done."""
    return int(record.get("queued", "0")) + int(record.get("held", "0"))
