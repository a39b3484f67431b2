"""The models of an engine by id, wherever each of them is."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import structlog
import torch

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.engine.models.full import FullModel
from gradstream.engine.residency.files import ParkedFile, ParkingPlace
from gradstream.engine.residency.parked import ParkedModel
from gradstream.engine.snapshot.state import ModelState, copy_of, to_adapter
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import ModelId, TenantId

_log = structlog.get_logger(__name__)

# What may be in host memory above its bound because it is still being written; one model in any case.
MAX_WRITING_BYTES = 256 << 20

Active = Adapter | FullModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """max_active: adapters on the device; a batch that needs more has them. host_bytes: of the others' states in host memory."""

    max_active: int = 64
    host_bytes: int = 4 << 30


class ModelTable:
    """Models by id, on the device when they are looked up: what is looked up comes there, and leaves it when others need the room.

    Not a mapping, whose get, values and items would bring every model to the device; `peek` leaves it where it is.

    Those used least recently are parked first, but none that was used in the batch that runs. Every rank makes the same calls, so the same
    models are on every rank's device. A model's tensors are others after it was parked; between two batches nobody may hold on to them.

    Files are written by a thread; a model is in host memory until its file is whole, and comes back from there.
    """

    def __init__(self, *, device: torch.device, bounds: Bounds, place: ParkingPlace) -> None:
        """place: for what host memory does not hold."""
        self._device = device
        self._bounds = bounds
        self._place = place
        # In the order in which they came.
        self._models: dict[ModelId, Active | ParkedModel] = {}
        # Those on the device, the one used least recently first.
        self._active: OrderedDict[ModelId, None] = OrderedDict()
        # Those in host memory, the one that has been there longest first.
        self._in_host: OrderedDict[ModelId, ParkedModel] = OrderedDict()
        self._host_bytes = 0
        # Those of them whose files are being written, in the order in which that began.
        self._writing: OrderedDict[ModelId, tuple[ParkedModel, Future[ParkedFile]]] = OrderedDict()
        # The models that the running batch has used; None between batches.
        self._in_use: set[ModelId] | None = None
        self._layouts: WeakValueDictionary[str, AdapterLayout] = WeakValueDictionary()
        self._is_full = False

    def __getitem__(self, model_id: ModelId) -> Active:
        """The model, on the device. Raises KeyError, torch.OutOfMemoryError with all as it was, ParkedFileDamaged."""
        model = self.bring(model_id)
        if self._in_use is not None:
            self._in_use.add(model_id)
        return model

    def __setitem__(self, model_id: ModelId, model: Active) -> None:
        self._leave(model_id)
        self._models[model_id] = model
        self._touch(model_id)
        if self._in_use is not None:
            self._in_use.add(model_id)
        self._park(max(self._bounds.max_active, 1))
        self._spill()

    def __delitem__(self, model_id: ModelId) -> None:
        del self._models[model_id]
        self._leave(model_id)

    def __iter__(self) -> Iterator[ModelId]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._models

    def clear(self) -> None:
        """Hold no model any more."""
        self._models.clear()
        self._active.clear()
        self._in_host.clear()
        self._host_bytes = 0
        for model_id in list(self._writing):
            self._forget_writing(model_id)

    def peek(self, model_id: ModelId) -> Active | ParkedModel | None:
        """The model where it is; None when there is none."""
        return self._models.get(model_id)

    def put_parked(self, state: ModelState, layout: AdapterLayout) -> None:
        """Hold an adapter with this state, which nobody changes any more, in the place of one of its id; it needs no room on the device.

        layout: of the state's digest; its tensors must be as that needs them.
        """
        parked = ParkedModel(state, layout=self._layouts.setdefault(layout.digest, layout))
        self._leave(state.model_id)
        self._models[state.model_id] = parked
        self._enter_host(state.model_id, parked)
        self._spill()

    def tenants(self) -> dict[ModelId, TenantId]:
        """Whose each model is."""
        return {model_id: model.tenant for model_id, model in self._models.items()}

    def capture(self, model_id: ModelId) -> ModelState:
        """A copy of the model's state, from where it is; nothing moves. Raises KeyError, ParkedFileDamaged."""
        model = self._models[model_id]
        return model.state() if isinstance(model, ParkedModel) else copy_of(model)

    def empty(self) -> "ModelTable":
        """Another table like this one, without models."""
        table = ModelTable(device=self._device, bounds=self._bounds, place=self._place)
        table._layouts = self._layouts
        return table

    def bring(self, model_id: ModelId) -> Active:
        """The model, brought to the device if it is not there; it may leave again at once. Raises like a look-up."""
        model = self._models[model_id]
        if isinstance(model, ParkedModel):
            model = self._wake(model_id, model)
        self._touch(model_id)
        return model

    def take(self, other: "ModelTable", *, drop_others: bool) -> None:
        """Hold the models of another table, as they are there, in the place of those of the same ids, or of all; it is not used any more."""
        if drop_others:
            self.clear()
        for model_id in other:
            model = other.peek(model_id)
            assert model is not None
            self._leave(model_id)
            self._models[model_id] = model
            if not isinstance(model, ParkedModel):
                self._touch(model_id)
            elif not model.is_in_file:
                self._enter_host(model_id, model)
        self._writing.update(other._writing)  # noqa: SLF001 (its own class)
        self._park(self._bounds.max_active)
        self._spill()

    @contextmanager
    def batch(self, model_ids: Sequence[ModelId]) -> Iterator[None]:
        """While the block runs, models that it uses stay on the device. model_ids: which it may use; they leave last.

        A block within another is part of that.
        """
        for model_id in model_ids:
            if model_id in self._active:
                self._active.move_to_end(model_id)
        if self._in_use is not None:
            yield
            return
        self._in_use = set()
        try:
            yield
        finally:
            self._in_use = None
        self._park(self._bounds.max_active)
        self._spill()

    def make_room(self) -> None:
        """Let a model leave the device if another one would be too many."""
        self._park(self._bounds.max_active - 1)

    @property
    def has_unused(self) -> bool:
        """True when a model is on the device that may leave it."""
        in_use = self._in_use or set()
        return any(one not in in_use and isinstance(self._models[one], Adapter) for one in self._active)

    def shed(self) -> None:
        """Let all models leave the device that the running batch has not used."""
        self._park(0)
        self._spill()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _wake(self, model_id: ModelId, parked: ParkedModel) -> Adapter:
        state = parked.state()
        self.make_room()
        adapter = to_adapter(state, parked.layout, device=self._device)
        self._leave(model_id)
        self._models[model_id] = adapter
        self._spill()
        return adapter

    def _touch(self, model_id: ModelId) -> None:
        """Note that a model that is on the device was used."""
        self._active[model_id] = None
        self._active.move_to_end(model_id)

    def _enter_host(self, model_id: ModelId, parked: ParkedModel) -> None:
        self._in_host[model_id] = parked
        self._host_bytes += parked.size_bytes

    def _leave(self, model_id: ModelId) -> None:
        """Forget where a model is."""
        self._active.pop(model_id, None)
        self._forget_writing(model_id)
        parked = self._in_host.pop(model_id, None)
        if parked is not None:
            self._host_bytes -= parked.size_bytes

    def _forget_writing(self, model_id: ModelId) -> None:
        """The file of a model is not wanted any more; one that is written nevertheless goes at once."""
        found = self._writing.pop(model_id, None)
        if found is not None:
            found[1].cancel()

    def _park(self, num_left: int) -> None:
        """Let adapters leave the device until so many are there, as far as they are not in use."""
        in_use = self._in_use or set()
        num_too_many = len(self._active) - max(num_left, 0)
        for model_id in [one for one in self._active if one not in in_use][: max(num_too_many, 0)]:
            model = self._models[model_id]
            if not isinstance(model, Adapter):
                continue
            self.put_parked(copy_of(model), model.layout)

    def _spill(self) -> None:
        """Let models leave host memory until they fit, but for those that are being written; what the disk has no room for stays."""
        self._take_files()
        # What will be left once the files are written.
        num_bytes = self._host_bytes - sum(parked.size_bytes for parked, _ in self._writing.values())
        for model_id, parked in list(self._in_host.items()):
            # After a refusal one at a time, until a file is written again.
            if num_bytes <= self._bounds.host_bytes or (self._is_full and self._writing):
                return
            if model_id in self._writing:
                continue
            self._writing[model_id] = parked, self._place.start(parked.held)
            num_bytes -= parked.size_bytes
            self._take_files(max_left_bytes=MAX_WRITING_BYTES)

    def settle(self) -> None:
        """Return when no file is being written, one that is not wanted any more included."""
        self._take_files(max_left_bytes=0, max_left=0)
        self._place.settle()

    def _take_files(self, *, max_left_bytes: int | None = None, max_left: int = 1) -> None:
        """Let the models whose files are written leave host memory.

        Waits until at most max_left files, or files of max_left_bytes (None: any), are still being written.
        """
        left_bytes = sum(parked.size_bytes for parked, _ in self._writing.values())
        for model_id, (parked, future) in list(self._writing.items()):
            is_enough = max_left_bytes is None or left_bytes <= max_left_bytes or len(self._writing) <= max_left
            if is_enough and not future.done():
                return
            del self._writing[model_id]
            left_bytes -= parked.size_bytes
            try:
                parked.leave_memory(future.result())
            except StorageFailure as failure:
                if not self._is_full:
                    _log.warning("parked_models_stay_in_memory", reason=failure.message, num_bytes=self._host_bytes)
                self._is_full = True
                continue
            self._is_full = False
            self._leave(model_id)
