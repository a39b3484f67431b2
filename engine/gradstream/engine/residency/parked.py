"""A model that is not on the device: a copy of its state in host memory or in a file."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.engine.residency.files import ParkedFile
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

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The tensors in host memory."""
        return self._state.tensors

    def leave_memory(self, file: ParkedFile) -> None:
        """Hold the tensors in the file from now on, to which they were written."""
        assert self._file is None
        self._file = file
        self._state = replace(self._state, tensors={})
