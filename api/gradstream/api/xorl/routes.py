"""The resources of the xorl dialect, in the order in which their routes are tried."""

from gradstream.api.xorl import endpoints, health

RESOURCES = (endpoints, health)
