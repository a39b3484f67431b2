"""An HTTP server that answers as an inference server would, or as the test wants it to."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_DEADLINE_S = 60.0


@dataclass
class Inference:
    """answers: status and body by path; anything else is 404. asked: method, path and Host of every request; encodings: what each takes.

    delay_s: how long an answer takes. most_at_once: requests that were answered at the same time; nobody is answered before it is
    least_at_once.
    """

    port: int
    answers: dict[str, tuple[int, bytes]]
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    encodings: list[str | None] = field(default_factory=list)
    delay_s: float = 0.0
    least_at_once: int = 1
    num_running: int = 0
    most_at_once: int = 0

    def says(self, path: str, content: Mapping[str, object], *, status: int = 200) -> None:
        self.answers[path] = (status, json.dumps(content).encode())


@contextlib.contextmanager
def inference_server() -> Iterator[Inference]:
    """A server on loopback whose /health answers 200."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.asked.append((self.command, self.path, self.headers["Host"]))
            state.encodings.append(self.headers["Accept-Encoding"])
            with turn:
                state.num_running += 1
                state.most_at_once = max(state.most_at_once, state.num_running)
                turn.notify_all()
                turn.wait_for(lambda: state.most_at_once >= state.least_at_once, _DEADLINE_S)
            time.sleep(state.delay_s)
            with turn:
                state.num_running -= 1
            status, body = state.answers.get(self.path, (404, b""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            del format, args

    turn = threading.Condition()
    server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)  # noqa: S104  all of 127/8
    server.daemon_threads = True
    state = Inference(port=server.server_address[1], answers={"/health": (200, b"")})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
