"""What the launcher says of addresses."""

import socket
from pathlib import Path

import pytest

from gradstream.shared.config import load_settings, resolve
from gradstream.shared.config.machine import Machine
from gradstream.worker.crew import Rendezvous
from gradstream.worker.launcher import CannotStart, Stop, serve, url_of
from gradstream.worker.voice import console


def test_a_port_that_is_taken_is_named_once(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = [f"--server.api_port={port}", f"--server.output_dir={tmp_path}"]
        settings = resolve(load_settings(Path("configs/tiny.yaml"), given), Machine.here()).settings
        with pytest.raises(CannotStart) as refusal:
            serve(settings, console=console(), stop=Stop(), meet=Rendezvous())
    assert str(refusal.value) == (
        f"api_host 127.0.0.1, api_port {port}: cannot listen there (Address already in use); "
        "stop what listens there, or choose another one with --api-port N"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")])
def test_an_address_is_one_that_a_client_can_use(host: str, url: str):
    assert url_of(host, 8000) == url
