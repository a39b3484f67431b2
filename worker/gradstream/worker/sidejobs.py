"""The rq tasks of the housekeeping process. Their arguments are JSON: the settings file's path, so no secret is in Redis, and wall times.

The times are those of `housekeeping.enqueue`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from gradstream.shared.clock import SystemClock
from gradstream.shared.config import Settings, read_handover
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.limits import limits_of
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.worker import collect, idle, sweeps
from gradstream.worker.accounting import account_storage
from gradstream.worker.parts import redis_url
from gradstream.worker.rescan import rescan
from gradstream.worker.retention import sweep_records
from gradstream.worker.storage import Storage


def sweep_sessions(settings_file: str, awake_ms: int, tick_ms: int | None = None) -> int:
    """Unload what ended sessions left behind, save and unload what was left idle; how many."""
    settings = read_handover(Path(settings_file))
    patience = sweeps.Patience(
        grace_s=settings.session_grace_s, idle_s=settings.idle_session_timeout, awake_ms=awake_ms
    )

    async def sweep_idle(parts: sweeps.Parts) -> int:
        return await idle.sweep_idle(parts, idle_s=settings.idle_session_timeout, awake_ms=awake_ms)

    async def sweep_ended(parts: sweeps.Parts) -> int:
        return await sweeps.sweep_sessions(parts, patience=patience)

    return _run(settings, sweep_idle, sweep_ended, tick_ms=tick_ms)


def sweep_files(settings_file: str, awake_ms: int, tick_ms: int | None = None) -> int:
    """Remove checkpoints and exports past their time to live, snapshots out of use and leftovers; how many."""
    del awake_ms
    works = (collect.sweep_checkpoints, collect.sweep_snapshots, collect.sweep_exports, collect.sweep_leftovers)
    return _run(read_handover(Path(settings_file)), *map(_awaited, works), tick_ms=tick_ms)


def keep_books(settings_file: str, awake_ms: int, tick_ms: int | None = None) -> int:
    """Write down how much disk each tenant uses, forget records that are over for long; how many were forgotten.

    Checkpoints that Redis does not know any more are recorded anew before anything else.
    """
    del awake_ms
    settings = read_handover(Path(settings_file))

    async def work(parts: sweeps.Parts) -> int:
        await rescan(parts)
        await account_storage(parts, limit_bytes=settings.storage_limit)
        return sweep_records(parts)

    return _run(settings, work, tick_ms=tick_ms)


_Work = Callable[[sweeps.Parts], Awaitable[int]]


def _awaited(work: Callable[[sweeps.Parts], int]) -> _Work:
    async def run(parts: sweeps.Parts) -> int:
        return work(parts)

    return run


def _run(settings: Settings, *works: _Work, tick_ms: int | None) -> int:
    async def run() -> int:
        async with _parts(settings, now_ms=_now_ms(tick_ms)) as parts:
            return await each(parts, works)

    return asyncio.run(run())


async def each(parts: sweeps.Parts, works: Sequence[_Work]) -> int:
    """The sum of what the works did. One that fails does not keep the others from their turn; what it raised is raised at the end."""
    num_done = 0
    errors: list[Exception] = []
    for work in works:
        try:
            num_done += await work(parts)
        except Exception as error:  # noqa: BLE001  it is raised again
            errors.append(error)
    if errors:
        raise ExceptionGroup("some of the work of this task failed", errors)
    return num_done


def _now_ms(tick_ms: int | None) -> int:
    """The wall time by which a task goes: the earlier one of its tick's and its start's. Tasks of earlier versions have no tick.

    A clock that jumps in between, either way, or a machine that sleeps, would make everybody seem silent by the later one.
    """
    now_ms = SystemClock().wall_ms()
    return now_ms if tick_ms is None else min(tick_ms, now_ms)


@asynccontextmanager
async def _parts(settings: Settings, *, now_ms: int) -> AsyncIterator[sweeps.Parts]:
    url = redis_url(settings)
    intake = RedisIntake(url, engine=settings.engine_name, limits=limits_of(settings))
    async with intake:
        with RedisCensus(url, engine=settings.engine_name) as census:
            yield sweeps.Parts(
                census=census,
                intake=intake,
                storage=Storage(Path(settings.output_dir)),
                now_ms=now_ms,
            )
