"""A checkpoint once more, as a save of another run: the same files, and a manifest of its own."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gradstream.engine.checkpoint.budget import DiskBudget
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.checkpoint.location import Checkpoint
from gradstream.engine.checkpoint.manifest import Manifest, read_manifest, write_manifest
from gradstream.engine.checkpoint.save import own_save
from gradstream.engine.files import whole_directory
from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import FutureId, TenantId

_MANIFEST_BYTES = 32 * 1024
# Another file system, one without hard links, or a file with as many names as it can have.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOrder:
    """What to copy where, for whom. job: the future of the job that asks; the same job again finds its own copy and is content."""

    source: Checkpoint
    target: Checkpoint
    job: FutureId
    tenant: TenantId
    ttl_seconds: int | None = None


def copy_checkpoint(
    order: CopyOrder,
    output_dir: Path,
    *,
    budget: DiskBudget | None = None,
    drafts: Drafts | None = None,
    clock: Clock | None = None,
) -> Manifest:
    """Make target from source, whole or not at all; the manifest of what lies there now.

    The files are shared where the file system has hard links (none is ever changed in place), so they take no more space, but they
    count in full against budget. Their digests are taken over, not computed: a load finds damage in either. drafts as in
    `save_content`. Raises UnknownModel when there is no source (or it is another tenant's), CheckpointExists when target is another
    job's, StorageLimit, StorageFailure, Revoked.
    """
    source_dir, directory = order.source.directory(output_dir), order.target.directory(output_dir)
    if directory.exists():
        return own_save(order.target, order.job, directory)
    source = read_manifest(source_dir, source=order.source.uri())
    if source.tenant != order.tenant:
        raise UnknownModel(f"there is no checkpoint {order.source.uri()}")
    if budget is not None:
        budget.admit(source.size_bytes + _MANIFEST_BYTES, what=order.target.uri())
    manifest = msgspec.structs.replace(
        source,
        kind=order.target.kind.value,
        source=order.target.uri(),
        job=order.job,
        model=order.target.model,
        created_ms=(clock or SystemClock()).wall_ms(),
        ttl_seconds=order.ttl_seconds,
    )
    draft_in = None if drafts is None else drafts.folder(directory)
    with whole_directory(directory, draft_in=draft_in) as draft:
        for name in source.files:
            _share(source_dir / name, draft / name, what=order.source.uri())
        write_manifest(draft, manifest)
    return manifest


def _share(source: Path, target: Path, *, what: str) -> None:
    """Give the file source the name target too, or copy it where that cannot be; raises UnknownModel when source is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise UnknownModel(f"there is no checkpoint {what}; it was deleted while it was copied") from error
