"""What goes over the socket when the server answers."""

import socket
import struct
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import h11
import httpx
import pytest
from tests.support.rig import Rig

_DEADLINE_S = 60.0
# tcpi_data_segs_in of Linux's struct tcp_info: 8 bytes, 24 words, 4 long words and 4 words stand before it.
_DATA_SEGMENTS_IN = struct.Struct("=152xI")


@pytest.fixture
def connection(rig: Rig) -> Iterator[socket.socket]:
    address = urlsplit(rig.base_url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.create_connection((address.hostname, address.port), timeout=_DEADLINE_S) as sock:
        yield sock


def head(method: str, path: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()


def read_answers(sock: socket.socket, *methods: str) -> list[tuple[int, bytes]]:
    """Status and body of the answers to requests of these methods, in the order in which they come."""
    answers = []
    for method in methods:
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "localhost")]))
        parser.send(h11.EndOfMessage())
        status, body = 0, b""
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                # A byte at a time: what follows belongs to the next answer.
                parser.receive_data(sock.recv(1))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        answers.append((status, body))
    return answers


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the segments of a connection")
def test_an_answer_is_one_segment(connection: socket.socket) -> None:
    for number in range(1, 4):
        connection.sendall(head("GET", "/api/v1/healthz"))
        ((status, body),) = read_answers(connection, "GET")
        assert status == 200
        assert body
        (segments,) = _DATA_SEGMENTS_IN.unpack_from(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
        assert segments == number


def test_requests_that_come_together_are_answered_in_their_order(connection: socket.socket) -> None:
    paths = ("/api/v1/healthz", "/nowhere", "/metrics", "/api/v1/healthz")
    connection.sendall(b"".join(head("GET", path) for path in paths))
    answers = read_answers(connection, *["GET"] * 4)
    assert [status for status, _ in answers] == [200, 404, 200, 200]
    assert answers[0][1] == answers[3][1]
    assert b"gradstream_api_requests_total" in answers[2][1]


def test_a_head_that_no_body_follows_is_sent(connection: socket.socket) -> None:
    for _ in range(2):
        connection.sendall(head("HEAD", "/openapi.json"))
        assert read_answers(connection, "HEAD") == [(200, b"")]
    connection.sendall(head("GET", "/api/v1/healthz"))
    assert [status for status, _ in read_answers(connection, "GET")] == [200]


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(rig: Rig, connection: socket.socket) -> None:
    body = b'{"tags": [], "user_metadata": null, "sdk_version": "0.38.0"}'
    fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nexpect: 100-continue\r\n\r\n"
    connection.sendall(head("POST", "/api/v1/create_session")[:-2] + fields.encode())
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert connection.recv(len(interim), socket.MSG_WAITALL) == interim
    connection.sendall(body)
    ((status, _),) = read_answers(connection, "POST")
    assert status == 200
    assert httpx.get(f"{rig.base_url}/api/v1/healthz", timeout=_DEADLINE_S).status_code == 200


def test_what_is_no_request_is_answered_and_the_connection_ends(connection: socket.socket) -> None:
    connection.sendall(b"what is this\r\n\r\n")
    answer = b""
    while part := connection.recv(4096):
        answer += part
    assert answer.startswith(b"HTTP/1.1 400 ")
