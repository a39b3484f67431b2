"""The job log on every server that it promises to work on."""

from collections.abc import AsyncIterator, Iterator

import pytest
from tests.support.joblog_bench import Bench
from tests.support.redis_server import DEBIAN, SHIPPED, binary_for, running_server

from gradstream.shared.joblog.limits import Limits


@pytest.fixture(scope="session", params=[SHIPPED, DEBIAN])
def joblog_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a server of each kind in turn."""
    if binary_for(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    with running_server(request.param) as server:
        yield server.url


@pytest.fixture
async def bench(joblog_url: str, engine_name: str) -> AsyncIterator[Bench]:
    """An open intake and feed with default limits."""
    async with Bench.running(joblog_url, engine_name, Limits()) as bench:
        yield bench
