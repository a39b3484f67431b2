"""Real Redis-compatible servers for tests, run by the project's own supervisor."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstream.shared.embedded.binary import find_binary
from gradstream.shared.embedded.config import Durability, EmbeddedConfig
from gradstream.shared.embedded.server import EmbeddedServer

# The server that gradstream ships with, and the oldest one it promises to work on.
SHIPPED = "shipped"
DEBIAN = "redis-server"
_MEMORY_BYTES = 256 * 1024**2


def binary_for(name: str) -> Path | None:
    """The binary behind a server name, None when this machine has none."""
    if name == SHIPPED:
        return find_binary()
    found = shutil.which(name)
    return Path(found) if found else None


@contextmanager
def running_server(
    name: str = SHIPPED, *, durability: Durability = "everysec", max_memory_bytes: int = _MEMORY_BYTES
) -> Iterator[EmbeddedServer]:
    """A fresh server with an empty data directory, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="gs-redis-"))
    config = EmbeddedConfig(
        data_dir=folder, durability=durability, max_memory_bytes=max_memory_bytes, binary=binary_for(name)
    )
    try:
        with EmbeddedServer(config) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)
