"""Writes a model to its place, whole or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.budget import DiskBudget, save_size_bytes, size_bytes
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.checkpoint.location import Checkpoint, CheckpointKind, Ephemeral, Location
from gradstream.engine.checkpoint.manifest import (
    MANIFEST_VERSION,
    FullFacts,
    Manifest,
    entries,
    read_manifest,
    write_manifest,
)
from gradstream.engine.checkpoint.peft_format import write_peft, write_tensors
from gradstream.engine.files import whole_directory
from gradstream.engine.optim.state import named_state, state_parts
from gradstream.engine.trained import TrainedModel
from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.errors import CheckpointExists, GradstreamError
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import LoraSpec

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

    @property
    def is_training(self) -> bool:
        """True for a checkpoint to train on, which has the optimizer's state."""
        return isinstance(self.location, Checkpoint) and self.location.kind is CheckpointKind.WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the manifest says of the files; see `Manifest`."""

    has_optimizer: bool
    lora: LoraSpec | None = None
    scale: float = 1.0
    full: FullFacts | None = None
    num_merges: int = 0


class Content(Protocol):
    """What is to be saved of a model. size_bytes: an upper bound, close to exact, of its files. write: fill an empty directory."""

    @property
    def model(self) -> TrainedModel: ...
    @property
    def facts(self) -> Facts: ...
    def size_bytes(self) -> int: ...
    def write(self, draft: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter, with its optimizer for a training checkpoint."""

    model: Adapter
    order: SaveOrder

    @property
    def facts(self) -> Facts:
        return Facts(
            has_optimizer=self.order.is_training,
            lora=self.model.spec,
            scale=self.model.scale,
            num_merges=self.model.num_merges,
        )

    def size_bytes(self) -> int:
        adapter = self.model
        state = state_parts(adapter.optimizer, adapter.layout) if self.order.is_training else ()
        return save_size_bytes(adapter.factors.layout, state=state)

    def write(self, draft: Path) -> None:
        adapter = self.model
        factors = adapter.factors
        write_peft(draft, factors.layout, factors.weights, scale=adapter.scale, base_model=self.order.base_model)
        if self.order.is_training:
            _write_optimizer(adapter, draft / OPTIMIZER_FILE)


def save_content(
    content: Content,
    order: SaveOrder,
    output_dir: Path,
    *,
    budget: DiskBudget | None = None,
    drafts: Drafts | None = None,
    clock: Clock | None = None,
) -> Manifest:
    """Write content as order says; the manifest of what lies there now.

    The accumulated gradient is not saved. Runs on one rank only. drafts: where a gang prepares its saves, None for a process that
    nobody succeeds. Raises CheckpointExists when the name is taken by another job and overwrite is false, StorageLimit when budget
    has no room for it, StorageFailure when the disk refuses, Revoked when another gang has taken over.
    """
    location = order.location
    directory = location.directory(output_dir)
    _check_tenant(content.model, location, directory)
    # A sampler's own weights have no name that a user could take twice.
    replace = order.overwrite or isinstance(location, Ephemeral)
    if directory.exists() and not replace:
        return own_save(location, order.job, directory)
    if budget is not None:
        coming_bytes = content.size_bytes() + _metadata_bytes(order)
        budget.admit(coming_bytes, replaced_bytes=size_bytes(directory), what=location.uri())
    try:
        draft_in = None if drafts is None else drafts.folder(directory)
        with whole_directory(directory, replace=replace, draft_in=draft_in) as draft:
            return _write(content, order, draft, clock=clock or SystemClock())
    except FileExistsError:
        return own_save(location, order.job, directory)


def _metadata_bytes(order: SaveOrder) -> int:
    metadata = order.user_metadata or {}
    # JSON may write a character in six bytes.
    return 6 * sum(len(key) + len(value) for key, value in metadata.items())


def _write(content: Content, order: SaveOrder, draft: Path, *, clock: Clock) -> Manifest:
    """Fill draft with every file of the save, the manifest last."""
    location, model, facts = order.location, content.model, content.facts
    content.write(draft)
    manifest = Manifest(
        version=MANIFEST_VERSION,
        kind=location.kind.value if isinstance(location, Checkpoint) else "ephemeral",
        source=location.uri(),
        job=order.job,
        model=model.model_id,
        tenant=model.tenant,
        base_model=order.base_model,
        lora=facts.lora,
        scale=facts.scale,
        step=model.step,
        has_optimizer=facts.has_optimizer,
        created_ms=clock.wall_ms(),
        files=entries(draft),
        ttl_seconds=order.ttl_seconds,
        user_metadata=order.user_metadata,
        optimizer=model.optimizer,
        full=facts.full,
        num_merges=facts.num_merges,
        optim_began=model.optim_began,
    )
    write_manifest(draft, manifest)
    return manifest


def _write_optimizer(adapter: Adapter, path: Path) -> None:
    views = named_state(state_parts(adapter.optimizer, adapter.layout), adapter.optim)
    tensors = {name: view.detach().cpu().clone() for name, view in views.items()}
    # The step is in the manifest: safetensors writes several entries here in any order, and equal states make equal files.
    write_tensors(path, tensors, metadata={"format": "pt"})


def _check_tenant(model: TrainedModel, location: Location, directory: Path) -> None:
    """A sampler's directory may be replaced, but never by another tenant; a checkpoint's is named after the tenant's own model."""
    if isinstance(location, Ephemeral) and directory.exists():
        manifest = read_manifest(directory, source=location.uri())
        if manifest.tenant != model.tenant:
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
            f"checkpoint {source} exists already; choose another name, delete it first, or set overwrite where the call has that"
        )
    return manifest
