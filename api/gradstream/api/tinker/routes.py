"""The resources of the tinker dialect, in the order in which their routes are tried: what comes all the time comes first."""

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
    training,
    futures,
    sessions,
    sampling,
    service,
    session_lists,
    models,
    weights,
    sampling_clients,
    custom_losses,
    runs,
    checkpoints,
    downloads,
    copies,
    account,
)
