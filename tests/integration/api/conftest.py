"""The rig of the API's integration tests."""

from collections.abc import Iterator

import pytest
from tests.support.rig import Rig, running_rig


@pytest.fixture
def rig(redis_url: str, engine_name: str) -> Iterator[Rig]:
    """A running server and worker on a queue of their own."""
    with running_rig(redis_url, engine=engine_name) as running:
        yield running
