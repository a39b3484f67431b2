"""A port for servers that need one."""

import pytest

from examples import local_server


@pytest.fixture
def free_port() -> int:
    """A loopback port that was free a moment ago."""
    return local_server.free_port()
