"""The resources of the xorl dialect, in the order in which their routes are tried."""

from gradstream.api.xorl import checkpoints, endpoints, gone, health, info, kill, saving, sleeping

RESOURCES = (health, saving, checkpoints, info, kill, sleeping, endpoints, gone)
