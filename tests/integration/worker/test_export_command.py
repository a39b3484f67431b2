"""`gradstream export` against servers that break off, answer strangely or never come to an end."""

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from gradstream.worker.cli import app

URI = "tinker://s1:train:0/weights/a"
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The URL of a server that answers every request so, and then closes the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET  # noqa: N815 - the library's name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def body(data: bytes, *, length: int | None = None, chunked: bool = False) -> Answer:
    """Answers with data under a Content-Length, its own unless given, or as a chunk after which no other comes."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Transfer-Encoding" if chunked else "Content-Length", "chunked" if chunked else str(length))
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)

    length = len(data) if length is None else length
    return answer


def archive() -> bytes:
    """Two files."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.size = 512
            tar.addfile(member, io.BytesIO(bytes(512)))
    return made.getvalue()


def said(url: str, target: Path, *arguments: str, status: int = 2) -> str:
    """What the command says on its way to this status; a traceback is none."""
    result = CliRunner().invoke(app, ["export", URI, "--out", str(target), "--base-url", url, *arguments])
    assert result.exit_code == status, (result.output, result.exception)
    assert target.exists() == (status == 0)
    assert list(target.parent.glob(".*.tmp")) == []
    return result.output


def test_a_whole_archive_becomes_a_directory(tmp_path: Path):
    with answering(body(archive())) as url:
        said(url, tmp_path / "got", status=0)
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("cut_bytes", [100, 512, 1000, 1024], ids=["in a header", "after one", "in a file", "after it"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "of a length"])
def test_an_archive_that_breaks_off_is_told_as_a_broken_connection(tmp_path: Path, cut_bytes: int, chunked: bool):
    whole = archive()
    with answering(body(whole[:cut_bytes], length=len(whole), chunked=chunked)) as url:
        assert "error: the connection broke while" in said(url, tmp_path / "got")


def test_what_is_no_archive_is_told_as_such(tmp_path: Path):
    with answering(body(b"<html>" * 200)) as url:
        assert "is no whole archive" in said(url, tmp_path / "got")


@pytest.mark.parametrize("data", [b"<html>hello</html>", b"{}", b"\xff\xfe"], ids=["HTML", "no fields", "no text"])
def test_an_answer_that_is_not_gradstreams_is_told_as_such(tmp_path: Path, data: bytes):
    with answering(body(data)) as url:
        assert "did not answer as a gradstream server does" in said(url, tmp_path / "got", "--merged")


def test_an_answer_that_breaks_off_is_told_as_a_broken_connection(tmp_path: Path):
    with answering(body(b'{"export_id', length=1000)) as url:
        assert "error: the connection broke while" in said(url, tmp_path / "got", "--merged")


def test_no_answer_and_no_server_are_told_with_the_url(tmp_path: Path):
    with answering(lambda handler: handler.wfile.write(b"hello\r\n")) as url:
        assert f"{url}/api/v1/training_runs" in said(url, tmp_path / "got")
    assert f"error: {url}/api/v1/training_runs" in said(url, tmp_path / "got")
    assert "cannot be reached" in said("http://[", tmp_path / "got")


def test_an_export_that_nobody_works_on_is_given_up_with_where_to_look(tmp_path: Path):
    waiting = msgspec.json.encode({"export_id": "e", "state": "waiting", "progress": 0.0})
    with answering(body(waiting)) as url:
        output = said(url, tmp_path / "got", "--merged", "--timeout", "0.1")
    assert "export e has stood at waiting 0% for 0.1 s" in output
    assert "logs/exports.log" in output


@pytest.mark.parametrize(
    ("uri", "tenant", "asked"),
    [
        ("xorl://policy/weights/a", "local", "training_runs/policy/checkpoints/weights/a/archive"),
        ("xorl://policy/weights/a", "alice", "training_runs/alice:policy/checkpoints/weights/a/archive"),
        ("xorl://s1:train:0/weights/a", "alice", "training_runs/s1:train:0/checkpoints/weights/a/archive"),
        (URI, "alice", "training_runs/s1:train:0/checkpoints/weights/a/archive"),
    ],
)
def test_checkpoints_of_models_that_clients_named_are_fetched_by_the_uri_that_they_know(
    tmp_path: Path, uri: str, tenant: str, asked: str
):
    paths: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        paths.append(handler.path)
        is_key = handler.path.endswith("/auth/apikey/me")
        body(msgspec.json.encode({"name": tenant}) if is_key else archive())(handler)

    with answering(answer) as url:
        result = CliRunner().invoke(app, ["export", uri, "--out", str(tmp_path / "got"), "--base-url", url])
    assert (result.exit_code, paths[-1]) == (0, f"/api/v1/{asked}"), result.output


@pytest.mark.parametrize("uri", ["default/a", "weights/a", "http://h/weights/a"])
def test_what_is_no_uri_of_a_checkpoint_is_refused_before_anybody_is_asked(tmp_path: Path, uri: str):
    result = CliRunner().invoke(app, ["export", uri, "--out", str(tmp_path / "got"), "--base-url", "http://["])
    assert result.exit_code == 2
    assert f"error: URI: {uri!r} is not a checkpoint's; it has the form tinker://RUN/KIND/NAME" in result.output
