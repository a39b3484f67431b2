"""The resources of the xorl dialect, in the order in which their routes are tried."""

from gradstream.api.xorl import (
    checkpoints,
    creation,
    endpoints,
    futures,
    gone,
    health,
    info,
    kill,
    saving,
    sessions,
    sleeping,
    training,
)

RESOURCES = (health, sessions, creation, training, futures, saving, checkpoints, info, kill, sleeping, endpoints, gone)
