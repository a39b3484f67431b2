"""Losses that a client writes: not run on this server."""

from fastapi import APIRouter

from gradstream.shared.errors import Unsupported

router = APIRouter()


@router.post("/create_custom_loss")
async def create_custom_loss() -> None:
    """Always refused: a graph from a client is code, and none runs here. The SDK does not even ask, as its flag for it is off."""
    raise Unsupported(
        "create_custom_loss: this server runs no losses sent by clients; use forward_backward_custom, which computes the loss on the "
        "client's side, or one of the named losses"
    )
