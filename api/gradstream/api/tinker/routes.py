"""The resources of the tinker dialect, in the order in which their routes are tried."""

from gradstream.api.tinker import (
    account,
    checkpoints,
    downloads,
    futures,
    models,
    runs,
    sampling,
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
    futures,
    runs,
    checkpoints,
    downloads,
    account,
)
