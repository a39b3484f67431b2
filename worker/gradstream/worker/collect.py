"""Files that nobody needs any more: expired checkpoints, snapshots that went out of use, what crashed writers left.

Every task looks at what is there and does what is left to do, so it may be repeated at any point.
"""

from collections import defaultdict
from collections.abc import Mapping

import structlog

from gradstream.engine.checkpoint.location import Ephemeral, ephemeral, parse_uri
from gradstream.shared.errors import StorageFailure, UnknownModel
from gradstream.shared.exports import QUEUE
from gradstream.shared.ids import SamplerId
from gradstream.shared.joblog.port import RecordKind
from gradstream.worker.sweeps import Parts, session_of

# A live session's snapshots: this many of the most recently used are always kept, others until they were unused for so long.
# An RL loop makes one a step and samples the newest few.
KEEP_SNAPSHOTS = 32
UNUSED_S = 3600.0
# Longer than any save or export takes between two of its files.
LEFTOVER_S = 6 * 3600.0
SETTLED_S = 60.0

_log = structlog.get_logger(__name__)


def sweep_checkpoints(parts: Parts) -> int:
    """Remove checkpoints whose time to live is over; how many. A newer save under the same name stays.

    The manifests of the others learn a time to live that was changed, so that it outlives the record.
    """
    num_removed = 0
    for uri, fields in parts.census.records(RecordKind.CHECKPOINT):
        expires_ms = fields.get("expires_ms")
        if not expires_ms or int(expires_ms) > parts.now_ms:
            _tell_manifest(parts, uri, fields)
        else:
            num_removed += _remove(parts, uri, fields)
    return num_removed


def _remove(parts: Parts, uri: str, fields: Mapping[str, str]) -> bool:
    """Remove the record and the very save that it describes, which need not be the one of that name by now."""
    created_ms = fields.get("created_ms", "")
    location = parse_uri(uri)
    is_removed = parts.storage.remove_save(location, created_ms=int(created_ms or 0))
    if not is_removed and _is_there(parts, uri):
        # Replaced a moment ago: the new save's record is about to be written over this one.
        return False
    # Only the record of that save: one that was replaced meanwhile has another time, and stays.
    parts.census.remove(RecordKind.CHECKPOINT, uri, created_ms=created_ms)
    _log.info("checkpoint_expired", path=uri)
    return True


def _is_there(parts: Parts, uri: str) -> bool:
    try:
        parts.storage.manifest(uri)
    except (UnknownModel, StorageFailure):
        return False
    return True


def _tell_manifest(parts: Parts, uri: str, fields: Mapping[str, str]) -> None:
    expires_ms, created_ms = fields.get("expires_ms"), fields.get("created_ms")
    if created_ms is None:
        return
    try:
        parts.storage.change_ttl(uri, created_ms=int(created_ms), expires_ms=int(expires_ms) if expires_ms else None)
    except (UnknownModel, StorageFailure) as error:
        _log.warning("manifest_unchanged", path=uri, reason=error.message)


def sweep_snapshots(parts: Parts) -> int:
    """Remove ephemeral snapshots that went out of use, with their samplers; how many.

    Those of ended sessions are removed with the session. Snapshots without a record (their commit never came, or the records are
    lost) go when they were unused for as long as others.
    """
    unused_since_ms = parts.now_ms - 1000 * UNUSED_S
    used_ms = parts.storage.snapshots()
    by_session: dict[str, list[str]] = defaultdict(list)
    orphans = set(used_ms)
    for sampler, fields in parts.census.records(RecordKind.SAMPLER):
        directory = ephemeral(SamplerId(sampler)).directory_name
        if directory in used_ms and fields.get("model_path") == Ephemeral(sampler=SamplerId(sampler)).uri():
            orphans.discard(directory)
            by_session[session_of(sampler, fields)].append(sampler)
    doomed = {directory for directory in orphans if used_ms[directory] < unused_since_ms}
    for samplers in by_session.values():
        recent = sorted(samplers, key=lambda one: used_ms[ephemeral(SamplerId(one)).directory_name], reverse=True)
        for sampler in recent[KEEP_SNAPSHOTS:]:
            directory = ephemeral(SamplerId(sampler)).directory_name
            if used_ms[directory] < unused_since_ms:
                parts.census.remove(RecordKind.SAMPLER, sampler)
                doomed.add(directory)
    num_removed = sum(parts.storage.remove_snapshot(directory) for directory in doomed)
    if num_removed:
        _log.info("snapshots_collected", num=num_removed)
    return num_removed


def sweep_exports(parts: Parts) -> int:
    """Remove exports whose time to live is over, and files of those without a record; how many directories."""
    wanted: set[str] = set()
    for export, fields in parts.census.children(RecordKind.EXPORT, QUEUE):
        if int(fields["expires_ms"]) > parts.now_ms:
            wanted.add(fields["directory"])
        else:
            parts.census.remove(RecordKind.EXPORT, export)
            _log.info("export_expired", export_id=export)
    # One that was finished in this very moment is not taken for one without a record.
    before_ms = parts.now_ms - int(1000 * SETTLED_S)
    doomed = [directory for directory, written_ms in parts.storage.exports().items() if written_ms < before_ms]
    return sum(parts.storage.remove_export(directory) for directory in doomed if directory not in wanted)


def sweep_leftovers(parts: Parts) -> int:
    """Remove what crashed writers and sweeps left; how many directories."""
    return parts.storage.remove_leftovers(before_ms=parts.now_ms - int(1000 * LEFTOVER_S))
