"""A model that is not on the device: a copy of its state in host memory or in a file."""

from dataclasses import replace

from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.engine.residency.files import ParkedFile, ParkingPlace
from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.trained import Owner
from gradstream.shared.ids import ModelId, TenantId


class ParkedModel:
    """A parked adapter. Its state is that of a snapshot, and nobody changes it."""

    def __init__(self, state: ModelState, *, layout: AdapterLayout) -> None:
        """state: of an adapter, its tensors as the layout needs them. layout: of its digest; parked models of one kind share it."""
        self._layout = layout
        self._state = state
        self._file: ParkedFile | None = None
        self.size_bytes = self._state.size_bytes

    @property
    def owner(self) -> Owner:
        return self._state.owner

    @property
    def model_id(self) -> ModelId:
        return self.owner.model_id

    @property
    def tenant(self) -> TenantId:
        return self.owner.tenant

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def layout(self) -> AdapterLayout:
        return self._layout

    @property
    def is_in_file(self) -> bool:
        return self._file is not None

    def state(self) -> ModelState:
        """What a snapshot has of the model; raises ParkedFileDamaged."""
        if self._file is None:
            return self._state
        return replace(self._state, tensors=self._file.read())

    def move_to_file(self, place: ParkingPlace) -> None:
        """Leave host memory; raises StorageFailure, with the model where it is, when it cannot be written."""
        assert self._file is None
        self._file = place.write(self._state.tensors)
        self._state = replace(self._state, tensors={})
