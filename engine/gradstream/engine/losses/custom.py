"""The refusal of custom: a loss that runs as a graph on the server."""

from gradstream.engine.losses._base import REFUSED

REFUSED.register("custom")(
    "loss_fn: 'custom' is not offered here, since this server runs no code of its clients; forward_backward_custom runs any loss "
    "function on the client's side"
)
