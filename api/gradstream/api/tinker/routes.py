"""The resources of the tinker dialect, in the order in which their routes are tried."""

from gradstream.api.tinker import (
    account,
    checkpoints,
    copies,
    custom_losses,
    downloads,
    futures,
    models,
    runs,
    sampling,
    sampling_clients,
    service,
    session_lists,
    sessions,
    training,
    weights,
)

RESOURCES = (
    service,
    sessions,
    session_lists,
    models,
    training,
    sampling,
    weights,
    sampling_clients,
    custom_losses,
    futures,
    runs,
    checkpoints,
    downloads,
    copies,
    account,
)
