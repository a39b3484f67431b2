"""`gradstream export`: a checkpoint of a running server as a directory here."""

import sys
import tarfile
import time
import urllib.error
import urllib.request
from http.client import HTTPResponse
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from gradstream.engine.files import whole_directory
from gradstream.shared.errors import StorageFailure
from gradstream.shared.exports import ExportState
from gradstream.worker.cli_errors import fail

_POLL_S = 1.0
_TIMEOUT_S = 60.0
_SCHEME = "tinker://"
_MAX_ERROR_BYTES = 64 * 1024

T = TypeVar("T")


class _Export(msgspec.Struct):
    export_id: str
    state: ExportState
    progress: float
    error: str | None = None


class _Urls(msgspec.Struct):
    archive: str


class Refused(Exception):
    """The server said no, or could not be reached; str() says why."""


def export(
    uri: Annotated[str, typer.Argument(metavar="URI", help="tinker://RUN/KIND/NAME")],
    *,
    merged: Annotated[
        bool, typer.Option("--merged", help="Base model and adapter as one model, which opens without peft.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Directory to make (default: the checkpoint's name).")] = None,
    base_url: Annotated[str, typer.Option(envvar="TINKER_BASE_URL", help="The server.")] = "http://127.0.0.1:5555",
    api_key: Annotated[str, typer.Option(envvar="TINKER_API_KEY", help="A key of it.")] = "",
) -> None:
    """Fetch a checkpoint from a running server: its adapter, or with --merged a model of its own."""
    target = out or Path(uri.rpartition("/")[2])
    if target.exists():
        fail(f"{target} exists already; name a directory that does not with --out")
    server = _Server(base_url.rstrip("/"), api_key)
    try:
        archive = server.merged(uri) if merged else server.adapter(uri)
        # A stream: nothing of the archive is in memory or on disk but the files.
        with (
            server.open("GET", archive) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
            whole_directory(target) as draft,
        ):
            tar.extractall(draft, filter="data")
    except (Refused, StorageFailure, FileExistsError, tarfile.TarError) as error:
        fail(str(error))
    typer.echo(target)


class _Server:
    """A running server's HTTP calls."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self._api = f"{base_url}/api/v1"
        self._headers = {"X-API-Key": api_key} if api_key else {}

    def adapter(self, uri: str) -> str:
        """The URL of the checkpoint's own files as a tar."""
        run, _, checkpoint_id = uri.removeprefix(_SCHEME).partition("/")
        return f"{self._api}/training_runs/{run}/checkpoints/{checkpoint_id}/archive"

    def merged(self, uri: str) -> str:
        """The URL of a merged export as a tar, once it is made."""
        asked = msgspec.json.encode({"path": uri, "format": "merged"})
        export = self._call(_Export, "POST", f"{self._api}/gradstream/exports", asked)
        where = f"{self._api}/gradstream/exports/{export.export_id}"
        shown = -1.0
        while export.state is not ExportState.DONE:
            if export.state is ExportState.FAILED:
                raise Refused(f"the export failed: {export.error}")
            if export.progress != shown:
                shown = export.progress
                sys.stderr.write(f"{export.state} {shown:.0%}\n")
            time.sleep(_POLL_S)
            export = self._call(_Export, "GET", where)
        return self._call(_Urls, "GET", f"{where}/urls").archive

    def open(self, method: str, url: str, body: bytes | None = None) -> HTTPResponse:
        """The response, to be closed; raises Refused with the server's own words."""
        if not url.startswith(("http://", "https://")):
            raise Refused(f"{url} is not the URL of a server; it begins with http:// or https://")
        headers = {**self._headers, **({"Content-Type": "application/json"} if body else {})}
        request = urllib.request.Request(url, data=body, headers=headers, method=method)  # noqa: S310 - checked above
        try:
            response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310 - checked above
        except urllib.error.HTTPError as error:
            raise Refused(_words_of(error.read(_MAX_ERROR_BYTES)) or f"{url}: {error}") from error
        except (urllib.error.URLError, TimeoutError) as error:
            raise Refused(f"{url} cannot be reached: {error}") from error
        assert isinstance(response, HTTPResponse)
        return response

    def _call(self, answer: type[T], method: str, url: str, body: bytes | None = None) -> T:
        with self.open(method, url, body) as response:
            return msgspec.json.decode(response.read(), type=answer)


class _Problem(msgspec.Struct):
    detail: str = ""


def _words_of(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Problem).detail
    except msgspec.DecodeError:
        return ""
