"""Models put to the checkpoint that the server's config names for their beginning. All functions are collective."""

import structlog
import torch

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.full import parts_of
from gradstream.engine.checkpoint.full_load import FullOrder, load_full
from gradstream.engine.checkpoint.load import is_same_optimizer
from gradstream.engine.checkpoint.manifest import Manifest
from gradstream.engine.checkpoint.shared import load, put
from gradstream.engine.checkpoint.start import CHANGED, Start, begins_there, files_digest
from gradstream.engine.models.full import FullModel
from gradstream.engine.optim.state import state_parts
from gradstream.engine.state import EngineState
from gradstream.shared.errors import StorageFailure

_log = structlog.get_logger(__name__)


def begin(state: EngineState, model: Adapter | FullModel, *, with_optimizer: bool) -> bool:
    """Give model the checkpoint's weights; False when the config names none, or none for this model.

    with_optimizer: the optimizer's state and the step too, if it is that of the model's optimizer; else they start fresh. Raises as
    loads do, with the model as it was.
    """
    start = state.start
    if start is None or (isinstance(model, Adapter) and not begins_there(model.model_id)):
        return False
    resumes = with_optimizer and start.manifest.has_optimizer and _is_same_optimizer(start.manifest, model)
    if with_optimizer and not resumes and state.comm.is_leader:
        _log.warning(
            "optimizer_begins_afresh", path=start.text, model_id=model.model_id, optimizer=model.optimizer.type
        )
    if isinstance(model, FullModel):
        _begin_full(state, model, start, resumes=resumes)
    else:
        content = load(
            state, start, tenant=None, with_optimizer=resumes, expected=model.spec, optimizer=model.optimizer
        )
        _check_same(content.manifest, start)
        put(state, model, content)
    return True


def _begin_full(state: EngineState, model: FullModel, start: Start, *, resumes: bool) -> None:
    order = FullOrder(
        directory=start.place,
        source=start.text,
        tenant=None,
        base_models=None,
        with_optimizer=resumes,
        digest=start.digest,
    )
    load_full(state, model, order)


def _check_same(manifest: Manifest, start: Start) -> None:
    """Raise StorageFailure when the checkpoint was replaced since the engine's start."""
    if files_digest(manifest) != start.digest:
        raise StorageFailure(CHANGED.format(start.text))


def _is_same_optimizer(manifest: Manifest, model: Adapter | FullModel) -> bool:
    dtype = torch.float32 if manifest.full is None else getattr(torch, manifest.full.dtype)
    if dtype.itemsize > model.weights.dtype.itemsize:
        return False
    saved = state_parts(manifest.optimizer, model.layout, weights_dtype=dtype)
    own = parts_of(model) if isinstance(model, FullModel) else state_parts(model.optimizer, model.layout)
    return is_same_optimizer(manifest.optimizer, model.optimizer, saved, own)
