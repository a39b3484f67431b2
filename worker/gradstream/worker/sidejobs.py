"""The rq tasks of the housekeeping process. Their arguments are JSON: the path of the settings file, so no secret is in Redis."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gradstream.shared.clock import SystemClock
from gradstream.shared.config import Settings, read_handover
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.worker import sweeps
from gradstream.worker.parts import queue_limits, redis_url
from gradstream.worker.storage import Storage


def sweep_sessions(settings_file: str) -> int:
    """Unload what ended sessions left behind; how many sessions."""
    settings = read_handover(Path(settings_file))

    async def sweep() -> int:
        async with _parts(settings) as parts:
            return await sweeps.sweep_sessions(parts, grace_s=settings.session_grace_s)

    return asyncio.run(sweep())


def sweep_checkpoints(settings_file: str) -> int:
    """Remove checkpoints past their time to live; how many."""
    settings = read_handover(Path(settings_file))

    async def sweep() -> int:
        async with _parts(settings) as parts:
            return sweeps.sweep_checkpoints(parts)

    return asyncio.run(sweep())


@asynccontextmanager
async def _parts(settings: Settings) -> AsyncIterator[sweeps.Parts]:
    url = redis_url(settings)
    intake = RedisIntake(url, engine=settings.engine_name, limits=queue_limits(settings))
    async with intake:
        with RedisCensus(url, engine=settings.engine_name) as census:
            yield sweeps.Parts(
                census=census,
                intake=intake,
                storage=Storage(Path(settings.output_dir)),
                now_ms=SystemClock().wall_ms(),
            )
