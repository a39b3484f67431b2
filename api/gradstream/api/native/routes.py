"""The resources that are this server's own."""

from gradstream.api.native import exports

RESOURCES = (exports,)
