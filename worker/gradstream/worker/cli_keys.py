"""`gradstream keys`: make, list and revoke API keys."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from gradstream.shared.clock import SystemClock
from gradstream.shared.config import ConfigError, load_settings
from gradstream.shared.ids import TenantId
from gradstream.shared.keys import KeyFileError, StoredKey, change_keys, mint, read_keys
from gradstream.shared.keys.api_key import looks_like_key
from gradstream.worker.cli_errors import fail

app = typer.Typer(
    help="API keys. A running server takes changes up within a second.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

KeyFile = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="The file of key hashes (api_keys_file in the config).")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Server config whose api_keys_file is meant.")
]


@app.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Who the key belongs to; a tenant may have several.")],
    *,
    file: KeyFile = None,
    config: ConfigFile = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    path = _path(file, config)
    try:
        made = mint(TenantId(tenant), created_ms=SystemClock().wall_ms())
        change_keys(path, lambda keys: (*keys, made.stored))
    except (KeyFileError, ValueError) as error:
        fail(str(error))
    typer.echo(made.text)
    sys.stderr.write(f"key {made.stored.key_id} of tenant {tenant} is in {path}; the line above is not shown again\n")


@app.command("list")
def list_keys(*, file: KeyFile = None, config: ConfigFile = None) -> None:
    """Print id, day of making and tenant of every key."""
    path = _path(file, config)
    try:
        keys = read_keys(path)
    except FileNotFoundError:
        fail(f"{path}: is not there; make it with `gradstream keys add TENANT --file {path}`")
    except KeyFileError as error:
        fail(str(error))
    for key in keys:
        made = datetime.fromtimestamp(key.created_ms / 1000, tz=UTC).date().isoformat()
        typer.echo(f"{key.key_id}  {made}  {key.tenant}")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: the 8 characters after tml-.")],
    *,
    file: KeyFile = None,
    config: ConfigFile = None,
) -> None:
    """Take a key out of force. Its tenant's models and checkpoints stay, for the tenant's other keys."""
    path = _path(file, config)
    if looks_like_key(key_id):
        fail(
            "ID: this is a whole key, now seen by whoever can list processes; give its id, the 8 characters after tml-"
        )

    def without(keys: tuple[StoredKey, ...]) -> list[StoredKey]:
        left = [key for key in keys if key.key_id != key_id]
        if len(left) == len(keys):
            raise KeyFileError(f"{path}: has no key {key_id[:80]!r}; `gradstream keys list` shows the ids")
        return left

    try:
        change_keys(path, without)
    except KeyFileError as error:
        fail(str(error))
    typer.echo(f"key {key_id} is revoked")


def _path(file: Path | None, config: Path | None) -> Path:
    if (file is None) == (config is None):
        fail("--file, --config: give one of the two")
    if file is not None:
        return file
    assert config is not None
    try:
        named = load_settings(config).api_keys_file
    except ConfigError as error:
        fail(str(error))
    if named is None:
        fail(f"{config}: sets no api_keys_file; add one, for example api_keys_file: api-keys.json")
    return Path(named).expanduser()
