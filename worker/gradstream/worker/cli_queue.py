"""`gradstream queue`: what waits, what is held, what runs."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import msgspec
import typer
from rich.live import Live

from gradstream.shared.joblog.look import QueueReader
from gradstream.shared.joblog.queue_look import QueueLook
from gradstream.worker.cli_errors import readable_errors
from gradstream.worker.cli_place import ConfigOption, DirOption, EngineOption, JsonOption, UrlOption, place_of
from gradstream.worker.inspect.place import CannotLook, names_of, reachable_redis
from gradstream.worker.inspect.queue_table import queue_table
from gradstream.worker.inspect.tables import console, write_json

_ALL = 1_000_000


def queue(  # noqa: PLR0913 - one parameter an option
    *,
    model: Annotated[str | None, typer.Option("--model", metavar="ID", help="Only this model or sampler.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="N", help="Jobs listed of each kind; 0 for all.")
    ] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Look again and again until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="S", help="Seconds between two looks.")] = 1.0,
    json: JsonOption = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """Show what waits, per model and tenant, what is held and for which seq, and what runs now.

    The queue of a stopped server is read from its files, with the Redis server that gradstream brings along.
    """
    place = place_of(config, redis_url, output_dir, engine)
    shown = limit or _ALL
    with (
        readable_errors(),
        reachable_redis(place) as reached,
        QueueReader(reached.url, engine=place.engine) as reader,
    ):
        _check_names(reader, place.engine, model)

        def look() -> QueueLook:
            found = reader.look() if reached.is_served else without_gang(reader.look())
            return narrowed(found, model=model, tenant=tenant)

        if not follow:
            found = look()
            if json:
                write_json(msgspec.structs.replace(found, jobs=found.jobs[:shown], held=found.held[:shown]))
            else:
                console().print(queue_table(found, limit=shown))
        elif json:
            _follow_lines(look, every_s=every)
        else:
            _follow_screen(look, limit=shown, every_s=every)


def _check_names(reader: QueueReader, engine: str, model: str | None) -> None:
    """Refuse an engine that never ran there and a model that is not on record, with those that are."""
    found = reader.look()
    is_empty = not (found.gang.epoch or found.jobs or found.held)
    if is_empty and (engines := reader.engines()) and engine not in engines:
        raise CannotLook(f"--engine: no gang of {engine} has led there; there are {names_of(engines)}")
    if model is not None and not any(one.owner == model for one in found.owners) and not reader.knows(model):
        raise CannotLook(f"--model: {model} is not on record there; there are {names_of(reader.models())}")


def without_gang(look: QueueLook) -> QueueLook:
    """The look at the queue of a server that does not run: its lease is a dead gang's, and nothing runs."""
    gang = msgspec.structs.replace(look.gang, lease_owner="", lease_left_s=0.0)
    return msgspec.structs.replace(
        look,
        gang=gang,
        running=None,
        owners=[msgspec.structs.replace(one, num_running=0) for one in look.owners],
        jobs=[msgspec.structs.replace(one, is_running=False) for one in look.jobs],
    )


def narrowed(look: QueueLook, *, model: str | None, tenant: str | None) -> QueueLook:
    """The look with the jobs and owners of one model or tenant only; the totals stay the engine's."""

    def is_meant(owner: str, of: str) -> bool:
        return (model is None or owner == model) and (tenant is None or of == tenant)

    return msgspec.structs.replace(
        look,
        tenants=[one for one in look.tenants if tenant is None or one.tenant == tenant],
        owners=[one for one in look.owners if is_meant(one.owner, one.tenant)],
        jobs=[one for one in look.jobs if is_meant(one.owner, one.tenant)],
        held=[one for one in look.held if is_meant(one.owner, one.tenant)],
    )


def _follow_lines(look: Callable[[], QueueLook], *, every_s: float) -> None:
    """A line of JSON for every look, until Ctrl-C or until nobody reads."""
    with suppress(KeyboardInterrupt, BrokenPipeError):
        while True:
            write_json(look(), line=True)
            time.sleep(every_s)


def _follow_screen(look: Callable[[], QueueLook], *, limit: int, every_s: float) -> None:
    """The tables in place, until Ctrl-C."""
    with (
        suppress(KeyboardInterrupt),
        Live(queue_table(look(), limit=limit), console=console(), auto_refresh=False) as live,
    ):
        while True:
            time.sleep(every_s)
            live.update(queue_table(look(), limit=limit), refresh=True)
