"""Writes an adapter to its place, whole or not at all."""

from dataclasses import dataclass
from pathlib import Path

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.budget import DiskBudget, save_size_bytes, size_bytes
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.checkpoint.location import Checkpoint, CheckpointKind, Ephemeral, Location
from gradstream.engine.checkpoint.manifest import MANIFEST_VERSION, Manifest, entries, read_manifest, write_manifest
from gradstream.engine.checkpoint.peft_format import write_peft, write_tensors
from gradstream.engine.files import whole_directory
from gradstream.engine.optim.state import named_state, state_parts
from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.errors import CheckpointExists, GradstreamError
from gradstream.shared.ids import FutureId

OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOrder:
    """What to save where. job: the future of the job that asks; the same job again finds its own checkpoint and is content."""

    location: Location
    job: FutureId
    base_model: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


def save_adapter(
    adapter: Adapter,
    order: SaveOrder,
    output_dir: Path,
    *,
    budget: DiskBudget | None = None,
    drafts: Drafts | None = None,
    clock: Clock | None = None,
) -> Manifest:
    """Write adapter's weights, and its optimizer for a training checkpoint, as order says; the manifest of what lies there now.

    The accumulated gradient is not saved. Runs on one rank only. drafts: where a gang prepares its saves, None for a process that
    nobody succeeds. Raises CheckpointExists when the name is taken by another job and overwrite is false, StorageLimit when budget
    has no room for it, StorageFailure when the disk refuses, Revoked when another gang has taken over.
    """
    location = order.location
    directory = location.directory(output_dir)
    _check_tenant(adapter, location, directory)
    # A sampler's own weights have no name that a user could take twice.
    replace = order.overwrite or isinstance(location, Ephemeral)
    if directory.exists() and not replace:
        return own_save(location, order.job, directory)
    if budget is not None:
        _ask(budget, adapter, order, directory)
    try:
        draft_in = None if drafts is None else drafts.folder(directory)
        with whole_directory(directory, replace=replace, draft_in=draft_in) as draft:
            return _write(adapter, order, draft, clock=clock or SystemClock())
    except FileExistsError:
        return own_save(location, order.job, directory)


def _ask(budget: DiskBudget, adapter: Adapter, order: SaveOrder, directory: Path) -> None:
    metadata = order.user_metadata or {}
    coming_bytes = save_size_bytes(
        adapter.layout,
        state=state_parts(adapter.optimizer, adapter.layout) if _has_optimizer(order.location) else (),
        # JSON may write a character in six bytes.
        metadata_bytes=6 * sum(len(key) + len(value) for key, value in metadata.items()),
    )
    budget.admit(coming_bytes, replaced_bytes=size_bytes(directory), what=order.location.uri())


def _has_optimizer(location: Location) -> bool:
    return isinstance(location, Checkpoint) and location.kind is CheckpointKind.WEIGHTS


def _write(adapter: Adapter, order: SaveOrder, draft: Path, *, clock: Clock) -> Manifest:
    """Fill draft with every file of the save, the manifest last."""
    location = order.location
    has_optimizer = _has_optimizer(location)
    write_peft(draft, adapter.layout, adapter.weights, scale=adapter.scale, base_model=order.base_model)
    if has_optimizer:
        _write_optimizer(adapter, draft / OPTIMIZER_FILE)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        kind=location.kind.value if isinstance(location, Checkpoint) else "ephemeral",
        source=location.uri(),
        job=order.job,
        model=adapter.model_id,
        tenant=adapter.tenant,
        base_model=order.base_model,
        lora=adapter.spec,
        scale=adapter.scale,
        step=adapter.step,
        has_optimizer=has_optimizer,
        created_ms=clock.wall_ms(),
        files=entries(draft),
        ttl_seconds=order.ttl_seconds,
        user_metadata=order.user_metadata,
        optimizer=adapter.optimizer,
    )
    write_manifest(draft, manifest)
    return manifest


def _write_optimizer(adapter: Adapter, path: Path) -> None:
    views = named_state(state_parts(adapter.optimizer, adapter.layout), adapter.optim)
    tensors = {name: view.detach().cpu().clone() for name, view in views.items()}
    # The step is in the manifest: safetensors writes several entries here in any order, and equal states make equal files.
    write_tensors(path, tensors, metadata={"format": "pt"})


def _check_tenant(adapter: Adapter, location: Location, directory: Path) -> None:
    """A sampler's directory may be replaced, but never by another tenant; a checkpoint's is named after the tenant's own model."""
    if isinstance(location, Ephemeral) and directory.exists():
        manifest = read_manifest(directory, source=location.uri())
        if manifest.tenant != adapter.tenant:
            raise CheckpointExists(f"sampler {location.sampler} exists already")


def own_save(location: Location, job: FutureId, directory: Path) -> Manifest:
    """The manifest of what this very job had saved before a crash; raises CheckpointExists when the name is another's."""
    source = location.uri()
    try:
        manifest = read_manifest(directory, source=source)
    except GradstreamError:
        manifest = None
    if manifest is None or manifest.job != job:
        raise CheckpointExists(
            f"checkpoint {source} exists already; choose another name, or set overwrite to replace it"
        )
    return manifest
