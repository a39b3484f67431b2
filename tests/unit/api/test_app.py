"""The app's own task, and what its access log says aloud."""

import asyncio
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from gradstream.api.access import AccessLog
from gradstream.api.app import create_app
from gradstream.api.config import ApiConfig
from gradstream.api.metrics import Metrics
from gradstream.api.parts import build_parts
from gradstream.shared.clock import SystemClock


class OddIntake:
    """Fails the first gap check in a way that nobody foresaw."""

    def __init__(self) -> None:
        self.num_checks = 0
        self.is_well = asyncio.Event()

    async def leading(self) -> int | None:
        return None

    async def fail_gaps(self) -> int:
        self.num_checks += 1
        if self.num_checks == 1:
            raise RuntimeError("an odd answer")
        self.is_well.set()
        return 0


async def test_the_gap_check_goes_on_after_an_error_that_nobody_foresaw() -> None:
    intake = OddIntake()
    config = ApiConfig(gap_check_s=0.001)
    app = create_app(build_parts(intake, clock=SystemClock(), config=config))  # type: ignore[arg-type]
    async with app.router.lifespan_context(app), asyncio.timeout(120):
        await intake.is_well.wait()


@pytest.mark.parametrize(
    ("path", "level"),
    [("/retrieve_future", "debug"), ("/retrieve_futures", "debug"), ("/create_model", "info")],
)
async def test_polls_are_not_logged_aloud(path: str, level: str) -> None:
    async def answer(_scope: object, _receive: object, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ignore(_message: object) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": f"/api/v1{path}", "route": SimpleNamespace(path=path)}
    with capture_logs() as logs:
        await AccessLog(answer, clock=SystemClock(), metrics=Metrics())(scope, ignore, ignore)  # type: ignore[arg-type]
    assert [(log["event"], log["log_level"]) for log in logs] == [("http_request", level)]
