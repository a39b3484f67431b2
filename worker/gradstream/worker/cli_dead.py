"""`gradstream dead`: jobs that were set aside because they killed the gang."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from gradstream.shared import codec
from gradstream.shared.clock import SystemClock
from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.worker.cli_errors import fail, readable_errors
from gradstream.worker.cli_place import ConfigOption, DirOption, EngineOption, JsonOption, UrlOption, place_of
from gradstream.worker.dead import DeadLetters, Letter
from gradstream.worker.inspect.describe import describe, describe_payload, text_lines
from gradstream.worker.inspect.place import Place, reachable_redis
from gradstream.worker.inspect.retry import CannotRetry, retry
from gradstream.worker.inspect.tables import add_row, console, moment, plain, size, table, write_json

app = typer.Typer(
    help="Jobs that were set aside because they killed the gang: list, show, retry, drop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Future = Annotated[str, typer.Argument(metavar="FUTURE", help="The job's future, as `dead list` shows it.")]


@app.command("list")
def list_letters(
    *,
    model: Annotated[str | None, typer.Option("--model", metavar="ID", help="Only this model or sampler.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
    output_dir: DirOption = None,
) -> None:
    """What was set aside, oldest first, whether or not the server runs."""
    letters = _letters(place_of(config, None, output_dir, None))
    with readable_errors():
        survey = letters.survey()
    for problem in survey.problems:
        sys.stderr.write(f"error: {plain(problem)}\n")
    found = [
        letter
        for letter in survey.letters
        if (model is None or letter.owner == model) and (tenant is None or letter.tenant == TenantId(tenant))
    ]
    if json:
        write_json(found)
        return
    made = table(
        f"dead letters in {letters.directory}",
        ["future", "op", "tenant", "set aside (UTC)"],
        ["deaths", "tokens", "body"],
        ["retried as"],
    )
    for letter in found:
        numbers = [str(letter.starts), str(letter.num_tokens), size(letter.num_bytes)]
        words = [letter.future_id, letter.op, letter.tenant, moment(letter.at_ms)]
        add_row(made, [*words, *numbers, letter.retried_as or "-"])
    console().print(made if found else f"no dead letters in {letters.directory}")


@app.command()
def show(
    future: Future,
    *,
    payload: Annotated[
        Path | None, typer.Option("--payload", metavar="FILE", help="Write the body there too, as msgpack.")
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
    output_dir: DirOption = None,
) -> None:
    """One job: its error, and its body with shapes and settings instead of tensors."""
    letters = _letters(place_of(config, None, output_dir, None))
    with readable_errors():
        letter = _letter(letters, future)
        body = letters.payload(letter) if letter.num_bytes else b""
    described = {"letter": describe(letter), "payload": describe_payload(body)}
    if payload is not None:
        write_payload(payload, body)
    if json:
        write_json(described)
    else:
        console().print("\n".join(plain(line) for line in text_lines(described)))


@app.command("retry")
def retry_letter(  # noqa: PLR0913 - one parameter an option
    future: Future,
    *,
    again: Annotated[bool, typer.Option("--again", help="Also when it was retried before.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0, metavar="S", help="Wait so long for the outcome and print it.")
    ] = 0.0,
    json: JsonOption = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """Submit the same body as a new job, and print its future.

    A model's job comes behind all that the model has accepted since, on a lane of its own: it is not put back where it was.
    The client that sent it has its failure, and is not told. The letter stays until it is dropped.
    """
    place = place_of(config, redis_url, output_dir, engine)
    letters = _letters(place)
    with readable_errors(), reachable_redis(place) as reached, letters.locked():
        letter = _letter(letters, future)
        try:
            new, outcome = asyncio.run(_retry(letters, letter, place, reached.url, again=again, wait_s=wait))
        except CannotRetry as error:
            fail(str(error))
    if json:
        write_json({"future_id": letter.future_id, "retried_as": new, "outcome": outcome})
        return
    typer.echo(new)
    if outcome is not None:
        console().print("\n".join(plain(line) for line in text_lines(describe(outcome))))


@app.command()
def drop(
    futures: Annotated[list[str] | None, typer.Argument(metavar="FUTURE...", help="Futures of the jobs.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Every letter.")] = False,
    config: ConfigOption = None,
    output_dir: DirOption = None,
) -> None:
    """Remove letters with their bodies; nothing else changes."""
    if every == bool(futures):
        fail("FUTURE..., --all: give one of the two")
    letters = _letters(place_of(config, None, output_dir, None))
    with readable_errors(), letters.locked():
        named = [letter.future_id for letter in letters.survey().letters] if every else [*map(FutureId, futures or ())]
        missing = [future for future in named if not letters.drop(future)]
    typer.echo(f"{len(named) - len(missing)} dropped")
    if missing:
        fail(f"there is no dead letter {', '.join(missing)}; `gradstream dead list` shows them")


async def _retry(
    letters: DeadLetters, letter: Letter, place: Place, url: str, *, again: bool, wait_s: float
) -> tuple[FutureId, object]:
    """The new job's future, and its outcome in short if it came in time."""
    async with RedisIntake(url, engine=place.engine, limits=place.limits) as intake:
        receipt = await retry(letters, letter, intake, at_ms=SystemClock().wall_ms(), again=again)
        view = await intake.wait(receipt.future_id, timeout_s=wait_s) if wait_s else None
    if view is None or view.outcome is None:
        return receipt.future_id, None
    return receipt.future_id, describe(codec.decode_outcome(view.outcome))


def write_payload(path: Path, body: bytes) -> None:
    """Write a job's body to a file that is not there yet; ends the command when it cannot."""
    try:
        with path.open("xb") as file:
            file.write(body)
    except OSError as error:
        fail(f"--payload: {path} cannot be written: {error.strerror}")


def _letters(place: Place) -> DeadLetters:
    with readable_errors():
        return DeadLetters(place.directory)


def _letter(letters: DeadLetters, future: str) -> Letter:
    letter = letters.letter(FutureId(future))
    if letter is None:
        fail(f"there is no dead letter {future}; `gradstream dead list` shows them")
    return letter
