"""The snapshots of one engine on disk; the package's docstring says how they lie there."""

import shutil
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradstream.engine.checkpoint.location import path_part
from gradstream.engine.checkpoint.manifest import damage_of, entries
from gradstream.engine.files import make_directories, storage_errors, whole_directory, write_whole_file
from gradstream.engine.snapshot.cut import (
    CUTS,
    MODELS,
    Cut,
    CutHead,
    CutId,
    ModelEntry,
    cut_ids,
    cut_name,
    cut_path,
    encode_cut,
    read_cut,
)
from gradstream.engine.snapshot.leftovers import remove_leftovers
from gradstream.engine.snapshot.shards import read_shards, whole, whole_part, write_shard
from gradstream.engine.snapshot.state import ModelState, owner_of
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import ModelId


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """cuts: the readable ones, newest first; their models' files are not verified. problems: what is wrong with the others."""

    cuts: list[Cut]
    problems: list[str]


class SnapshotStore:
    """Reads and writes below directory. One writer at a time; not for use by several threads.

    A cut refers to the directories of the cut before it for what did not change. That is the last one that this object wrote, or the
    one it was told to continue from: never just the newest on disk, which may be that of a writer that was fenced off.
    """

    def __init__(self, directory: Path, *, base: Cut | None = None) -> None:
        self.directory = directory
        self._base = base

    @property
    def base(self) -> Cut | None:
        """The cut that the next one builds on."""
        return self._base

    def continue_from(self, cut: Cut) -> None:
        """Build the next cut on this one, which was restored."""
        self._base = cut

    def write(self, head: CutHead, changed: Sequence[ModelState], *, live: Collection[ModelId]) -> Cut:
        """Write a cut of the live models: the changed ones as they are here, the others as the base cut has them.

        On return everything is on disk. After StorageFailure (the disk is full, a directory of the base is gone) there is no such cut,
        the base is as before, and what counted as changed has to be written with the next one. Raises ValueError when a live model
        is in neither, a changed one is not live, or head is not after the base.
        """
        states = {state.model_id: state for state in changed}
        kept = self._kept(head, states, live)
        path = self._path(head.id)
        if path.exists():
            raise StorageFailure(f"snapshot {cut_name(head.id)} exists already")
        written: list[ModelEntry] = []
        try:
            self._make_parents(states)
            written.extend(self._write_model(head, state) for state in states.values())
            models = kept | dict(zip(states, written, strict=True))
            cut = Cut(head=head, models={model_id: models[model_id] for model_id in sorted(models)})
            write_whole_file(path, encode_cut(cut))
        except BaseException:
            self._withdraw(head, states)
            raise
        self._base = cut
        return cut

    def gone(self) -> set[ModelId]:
        """Models of the base cut whose files are not there any more; they count as changed, or no cut can be written."""
        if self._base is None:
            return set()
        return {model_id for model_id, entry in self._base.models.items() if not self._is_there(entry)}

    def survey(self) -> Survey:
        """Every cut that there is, and what cannot be read."""
        cuts, problems = [], []
        for cut_id in cut_ids(self.directory):
            try:
                cuts.append(self.find(cut_id))
            except StorageFailure as failure:
                problems.append(failure.message)
        return Survey(cuts=cuts, problems=problems)

    def cuts(self) -> list[Cut]:
        """The readable cuts, newest first."""
        return self.survey().cuts

    def find(self, cut_id: CutId) -> Cut:
        """The cut; raises StorageFailure when it is missing or unreadable."""
        return read_cut(self.directory, cut_id)

    def verify(self, cut: Cut, model_ids: Iterable[ModelId] | None = None) -> None:
        """Read every file of these models (all of them when None); raises StorageFailure naming the first that is not as written."""
        for model_id in cut.models if model_ids is None else model_ids:
            entry = cut.models[model_id]
            damage = damage_of(self.directory / entry.directory, entry.files)
            if damage is not None:
                raise StorageFailure(
                    f"snapshot {cut.name} is damaged at model {model_id}: in {entry.directory}, {damage}"
                )

    def read(self, cut: Cut, model_id: ModelId) -> ModelState:
        """One model of a cut, its files not verified; raises StorageFailure when they cannot be read."""
        entry = cut.models[model_id]
        return ModelState(
            owner=owner_of(model_id, entry),
            scale=entry.scale,
            step=entry.step,
            has_grad=entry.has_grad,
            layout_digest=entry.layout_digest,
            optimizer=entry.optimizer,
            reduction=entry.reduction,
            valid_tokens=entry.valid_tokens,
            is_asleep=entry.is_asleep,
            optim_began=entry.optim_began,
            tensors=read_shards(self.directory / entry.directory, entry.files, entry.tensors),
            kind=entry.kind,
        )

    def collect(self, keep: Collection[CutId]) -> int:
        """Remove the cuts that are not kept, then the model directories and drafts that no remaining cut needs; how many cuts went.

        Nothing newer than the newest kept cut is touched: it may be the work of a successor. So a caller that has been fenced off does
        no harm, but it must know its place before it asks. Raises StorageFailure when a kept cut, or a newer one, cannot be read,
        since what it refers to is then unknown.
        """
        if not keep:
            return 0
        newest = max(keep)
        doomed = [cut_id for cut_id in cut_ids(self.directory) if cut_id < newest and cut_id not in keep]
        remaining = {*keep, *(cut_id for cut_id in cut_ids(self.directory) if cut_id > newest)}
        needed = {entry.directory for cut_id in remaining for entry in self.find(cut_id).models.values()}
        with storage_errors(f"cannot remove snapshots below {self.directory}"):
            remove_leftovers(
                files=[self._path(cut_id) for cut_id in doomed],
                cuts=self.directory / CUTS,
                models=self.directory / MODELS,
                needed={self.directory / directory for directory in needed},
                newest=newest,
            )
        return len(doomed)

    def _kept(self, head: CutHead, states: Collection[ModelId], live: Collection[ModelId]) -> dict[ModelId, ModelEntry]:
        """The base's entries of the live models that did not change; raises like `write`."""
        base = self._base
        if base is not None and head.id <= base.id:
            raise ValueError(f"snapshot {cut_name(head.id)} is not after {base.name}")
        if unknown := sorted(set(states) - set(live)):
            raise ValueError(f"changed models {unknown} are not live")
        known = {} if base is None else base.models
        unchanged = sorted(set(live) - set(states))
        if missing := [model_id for model_id in unchanged if model_id not in known]:
            raise ValueError(f"live models {missing} are neither given nor in the snapshot before")
        for model_id in unchanged:
            if not self._is_there(known[model_id]):
                raise StorageFailure(
                    f"snapshot files of model {model_id} are gone: {self.directory / known[model_id].directory}"
                )
        return {model_id: known[model_id] for model_id in unchanged}

    def _is_there(self, entry: ModelEntry) -> bool:
        directory = self.directory / entry.directory
        return all((directory / name).is_file() for name in entry.files)

    def _make_parents(self, model_ids: Iterable[ModelId]) -> None:
        with storage_errors(f"cannot write below {self.directory}"):
            make_directories(self.directory / CUTS)
            for model_id in model_ids:
                make_directories(self.directory / MODELS / path_part(model_id))

    def _write_model(self, head: CutHead, state: ModelState) -> ModelEntry:
        directory = _model_directory(head, state.model_id)
        target = self.directory / directory
        # A directory that lies there is of a cut that was never finished.
        with whole_directory(target, replace=True) as draft:
            write_shard(draft, {name: whole_part(tensor) for name, tensor in state.tensors.items()}, rank=0)
            files = entries(draft)
        return ModelEntry(
            directory=directory,
            files=files,
            tensors={name: whole(tensor) for name, tensor in state.tensors.items()},
            kind=state.kind,
            tenant=state.owner.tenant,
            session_id=state.owner.session_id,
            step=state.step,
            has_grad=state.has_grad,
            spec=state.owner.spec,
            scale=state.scale,
            layout_digest=state.layout_digest,
            user_metadata=state.owner.user_metadata,
            optimizer=state.optimizer,
            reduction=state.reduction,
            valid_tokens=state.valid_tokens,
            is_asleep=state.is_asleep,
            optim_began=state.optim_began,
        )

    def _withdraw(self, head: CutHead, model_ids: Iterable[ModelId]) -> None:
        """Remove the directories of a cut that was not written, unless its file got its name after all."""
        if self._path(head.id).exists():
            return
        for model_id in model_ids:
            with suppress(OSError):
                shutil.rmtree(self.directory / _model_directory(head, model_id), ignore_errors=True)

    def _path(self, cut_id: CutId) -> Path:
        return cut_path(self.directory, cut_id)


def _model_directory(head: CutHead, model_id: ModelId) -> str:
    return f"{MODELS}/{path_part(model_id)}/{cut_name(head.id)}"
