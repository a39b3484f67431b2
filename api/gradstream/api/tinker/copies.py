"""Copying checkpoints between runs: not offered."""

from fastapi import APIRouter

from gradstream.shared.errors import Unsupported

router = APIRouter()


@router.post("/copy_weights")
async def copy_weights() -> None:
    """Always refused: load the checkpoint into a new model and save it there."""
    raise Unsupported(
        "copy_weights: checkpoints are not copied between runs here; create_training_client_from_state_with_optimizer(path) and "
        "save_state(name) give a new run that holds the same weights and optimizer"
    )
