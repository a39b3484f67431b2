"""Exports of checkpoints as API and housekeeping both see them: ids, states and the fields of their records."""

import hashlib
from enum import StrEnum

from gradstream.shared.ids import ModelId

# The rq queue that exports are made from; all records of exports are listed under it.
QUEUE = "exports"
# A directory below output_dir, with one directory for each export.
EXPORTS = "exports"
_DIGEST_BYTES = 12


class ExportState(StrEnum):
    """waiting: nobody works on it. running: progress says how far. done: its files can be fetched. failed: code and error say why."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


OPEN = frozenset({ExportState.WAITING, ExportState.RUNNING})


def export_id(run: ModelId, path: str, *, created_ms: str, form: str) -> str:
    """The id of an export: the same for the same save in the same form, another one for a later save of that name."""
    digest = hashlib.blake2b(f"{path} {created_ms} {form}".encode(), digest_size=_DIGEST_BYTES).hexdigest()
    return f"{run}:export:{digest}"


def export_directory(export: str) -> str:
    """Where an export lies below output_dir."""
    return f"{EXPORTS}/{export.replace(':', '+')}"
