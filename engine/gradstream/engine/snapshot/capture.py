"""Copies of an engine's models between two batches, wherever each of them is."""

from collections.abc import Iterable

from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.state import EngineState
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import ModelId


def capture(state: EngineState, model_ids: Iterable[ModelId]) -> list[ModelState]:
    """These models as they are now, in this order; not collective, and to be called between batches.

    Models on the device are copied to host memory; those that are parked are there already, or mapped from their files. Raises
    UnknownModel, naming the model, when one is not held by this engine, and ParkedFileDamaged.
    """
    return [_captured(state, model_id) for model_id in model_ids]


def _captured(state: EngineState, model_id: ModelId) -> ModelState:
    if model_id not in state.models:
        raise UnknownModel(f"model {model_id} is not held by this engine, so it cannot be copied")
    return state.models.capture(model_id)
