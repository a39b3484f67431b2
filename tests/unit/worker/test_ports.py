"""The API's port, as asked for or a free one, and what the launcher says of addresses."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradstream.shared.config import Settings, load_settings, resolve
from gradstream.shared.config.machine import Machine
from gradstream.worker.launcher import Launch, serve
from gradstream.worker.ports import PortTaken, with_free_port
from gradstream.worker.rendezvous import Rendezvous
from gradstream.worker.shift import CannotStart, Stop, url_of
from gradstream.worker.voice import console

pytestmark = pytest.mark.config_field("api_port")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def settings(port: int, *, asked_for: bool = False, host: str = "127.0.0.1") -> Settings:
    explicit = frozenset({"api_port"} if asked_for else ())
    return Settings(model_path="m", api_host=host, api_port=port, explicit=explicit)


def test_a_port_that_is_taken_is_named_once(tmp_path: Path, taken: int):
    given = [f"--server.api_port={taken}", f"--server.output_dir={tmp_path}"]
    resolved = resolve(load_settings(Path("configs/tiny.yaml"), given), Machine.here()).settings
    with pytest.raises(CannotStart) as refusal:
        serve(Launch(settings=resolved, meet=Rendezvous()), console=console(), stop=Stop())
    assert str(refusal.value) == (
        f"api_host 127.0.0.1, api_port {taken}: cannot listen there (Address already in use); "
        "stop what listens there, or choose another one with --api-port N"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_free_port_is_used_without_a_word():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
    assert with_free_port(settings(free)) == (settings(free), None)


def test_a_taken_port_that_nobody_asked_for_is_exchanged_and_said(taken: int):
    found, warning = with_free_port(settings(taken))
    assert found.api_port != taken
    assert f"PORT {taken} IS TAKEN" in warning
    assert f"PORT {found.api_port} instead" in warning
    socket.create_server(("127.0.0.1", found.api_port)).close()


def test_a_taken_port_that_was_asked_for_is_refused(taken: int):
    with pytest.raises(PortTaken, match=rf"api_port {taken}: cannot listen there .*--api-port N"):
        with_free_port(settings(taken, asked_for=True))


def test_an_address_of_another_machine_is_no_reason_to_try_other_ports():
    with pytest.raises(PortTaken, match=r"api_host 192\.0\.2\.1"):
        with_free_port(settings(5555, host="192.0.2.1"))


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")])
def test_an_address_is_one_that_a_client_can_use(host: str, url: str):
    assert url_of(host, 8000) == url
