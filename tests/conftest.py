"""Fixtures with a lifetime that many tests share."""

import uuid
from collections.abc import Iterator

import pytest

from tests.support.redis_server import running_server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a real server that lives as long as the test run. Use it with engine_name."""
    with running_server() as server:
        yield server.url


@pytest.fixture
def engine_name() -> str:
    """An engine name that no other test uses, so that tests share a server without meeting."""
    return f"t{uuid.uuid4().hex[:12]}"
