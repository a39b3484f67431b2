"""`gradstream export`: a checkpoint of a running server as a directory here."""

import sys
import tarfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from gradstream.engine.files import whole_directory
from gradstream.shared.errors import StorageFailure
from gradstream.shared.exports import ExportState
from gradstream.shared.ids import TenantId, named_model
from gradstream.worker.cli_errors import fail

_POLL_S = 1.0
_TIMEOUT_S = 60.0
_SCHEME = "tinker://"
_NAMED_SCHEME = "xorl://"
_MAX_ERROR_BYTES = 64 * 1024

T = TypeVar("T")


class _Export(msgspec.Struct):
    export_id: str
    state: ExportState
    progress: float
    error: str | None = None


class _Urls(msgspec.Struct):
    archive: str


class _OwnKey(msgspec.Struct):
    """name: that of its tenant."""

    name: str


class Refused(Exception):
    """The server said no, or could not be reached; str() says why."""


def export(
    uri: Annotated[str, typer.Argument(metavar="URI", help="tinker://RUN/KIND/NAME or xorl://MODEL/KIND/NAME")],
    *,
    merged: Annotated[
        bool, typer.Option("--merged", help="Base model and adapter as one model, which opens without peft.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Directory to make (default: the checkpoint's name).")] = None,
    base_url: Annotated[str, typer.Option(envvar="TINKER_BASE_URL", help="The server.")] = "http://127.0.0.1:5555",
    api_key: Annotated[str, typer.Option(envvar="TINKER_API_KEY", help="A key of it.")] = "",
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", min=0, metavar="S", help="Give up when the server's work stands still this long."),
    ] = 600.0,
) -> None:
    """Fetch a checkpoint from a running server: its adapter, or with --merged a model of its own."""
    if not uri.startswith((_SCHEME, _NAMED_SCHEME)):
        fail(
            f"URI: {uri!r} is not a checkpoint's; it has the form {_SCHEME}RUN/KIND/NAME or {_NAMED_SCHEME}MODEL/KIND/NAME"
        )
    target = out or Path(uri.rpartition("/")[2])
    if target.exists():
        fail(f"{target} exists already; name a directory that does not with --out")
    server = _Server(base_url.rstrip("/"), api_key)
    try:
        stored = server.stored(uri)
        server.unpack(server.merged(stored, timeout_s=timeout_s) if merged else server.adapter(stored), target)
    except (Refused, StorageFailure) as error:
        fail(str(error))
    except FileExistsError:
        fail(f"{target} was made by someone else meanwhile; name another directory with --out")
    typer.echo(target)


class _Server:
    """A running server's HTTP calls."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self._api = f"{base_url}/api/v1"
        self._headers = {"X-API-Key": api_key} if api_key else {}

    def stored(self, uri: str) -> str:
        """The URI as the server keeps it: a model that its owner named is known by the owner, too."""
        if not uri.startswith(_NAMED_SCHEME):
            return uri
        name, _, rest = uri.removeprefix(_NAMED_SCHEME).partition("/")
        # Ids of models that nobody named have colons, and are shown as they are.
        if ":" not in name:
            own = self._call(_OwnKey, "GET", f"{self._api}/auth/apikey/me")
            name = named_model(name, tenant=TenantId(own.name))
        return f"{_SCHEME}{name}/{rest}"

    def adapter(self, uri: str) -> str:
        """The URL of the checkpoint's own files as a tar."""
        run, _, checkpoint_id = uri.removeprefix(_SCHEME).partition("/")
        return f"{self._api}/training_runs/{run}/checkpoints/{checkpoint_id}/archive"

    def merged(self, uri: str, *, timeout_s: float) -> str:
        """The URL of a merged export as a tar, once it is made. Raises Refused when nothing of it changes for timeout_s."""
        asked = msgspec.json.encode({"path": uri, "format": "merged"})
        export = self._call(_Export, "POST", f"{self._api}/gradstream/exports", asked)
        where = f"{self._api}/gradstream/exports/{export.export_id}"
        shown, changed_s = "", time.monotonic()
        while export.state is not ExportState.DONE:
            if export.state is ExportState.FAILED:
                raise Refused(f"the export failed: {export.error}")
            now = f"{export.state} {export.progress:.0%}"
            if now != shown:
                shown, changed_s = now, time.monotonic()
                sys.stderr.write(f"{now}\n")
            elif time.monotonic() - changed_s >= timeout_s:
                raise Refused(
                    f"export {export.export_id} has stood at {now} for {timeout_s:g} s: it waits behind others, or the server's "
                    "exporter does not run (logs/exports.log in its output_dir). The same command goes on waiting for it"
                )
            time.sleep(_POLL_S)
            export = self._call(_Export, "GET", where)
        return self._call(_Urls, "GET", f"{where}/urls").archive

    def unpack(self, archive: str, target: Path) -> None:
        """Make the directory target of a tar. Raises Refused, StorageFailure, FileExistsError; then nothing is left of it."""
        try:
            # A stream: nothing of the archive is in memory or on disk but the files.
            with (
                self.open("GET", archive) as response,
                # Of a stream, tarfile asks for read() alone.
                tarfile.open(fileobj=_Body(response, archive), mode="r|") as tar,  # type: ignore[call-overload]
                whole_directory(target) as draft,
            ):
                tar.extractall(draft, filter="data")
        except tarfile.TarError as error:
            raise Refused(f"{archive} is no whole archive: {error}; run the command again") from error

    def open(self, method: str, url: str, body: bytes | None = None) -> HTTPResponse:
        """The response, to be closed; raises Refused with the server's own words."""
        if not url.startswith(("http://", "https://")):
            raise Refused(f"{url} is not the URL of a server; it begins with http:// or https://")
        headers = {**self._headers, **({"Content-Type": "application/json"} if body else {})}
        try:
            request = urllib.request.Request(url, data=body, headers=headers, method=method)  # noqa: S310 - checked above
            response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310 - checked above
        except urllib.error.HTTPError as error:
            raise Refused(_words_of(error) or f"{url}: {error}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise Refused(
                f"{url} cannot be reached: {_reason(error)}; is the server up, and --base-url right?"
            ) from error
        assert isinstance(response, HTTPResponse)
        return response

    def _call(self, answer: type[T], method: str, url: str, body: bytes | None = None) -> T:
        with self.open(method, url, body) as response:
            data = _Body(response, url).read()
        try:
            return msgspec.json.decode(data, type=answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refused(
                f"{url} did not answer as a gradstream server does ({error}); is --base-url right?"
            ) from error


class _Body:
    """A response's bytes, whole: reading raises Refused when the connection breaks or ends before all of it came."""

    def __init__(self, response: HTTPResponse, url: str) -> None:
        self._response = response
        self._url = url

    def read(self, size: int | None = None) -> bytes:
        """At most size bytes, or all; empty at the end."""
        try:
            data = self._response.read(size)
        except (OSError, HTTPException) as error:
            raise Refused(self._broke(_reason(error))) from error
        # Reading in pieces, http.client takes an early end for the end.
        if not data and size != 0 and self._response.length:
            raise Refused(self._broke(f"{self._response.length} bytes are missing"))
        return data

    def _broke(self, why: str) -> str:
        return f"the connection broke while {self._url} was read: {why}; run the command again"


class _Problem(msgspec.Struct):
    detail: str = ""


def _words_of(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, empty when it does not say it as gradstream does."""
    try:
        return msgspec.json.decode(error.read(_MAX_ERROR_BYTES), type=_Problem).detail
    except (msgspec.DecodeError, UnicodeDecodeError, OSError, HTTPException):
        return ""


def _reason(error: Exception) -> str:
    """The error in words; some say nothing but their type."""
    return str(error) or type(error).__name__
