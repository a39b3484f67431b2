"""The gate: who gets in with keys, who without, and what is said of those who do not."""

import functools
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from tests.support.rig import FAST, Rig, running_rig

from gradstream.shared.ids import TenantId
from gradstream.shared.keys import change_keys, mint

_DEADLINE_S = 60.0
# Failures that are answered before any is turned away (FailureLimit).
_BURST = 20


@dataclass(frozen=True, slots=True)
class Guarded:
    """A server with one key each of alice and of the machine's own tenant."""

    rig: Rig
    file: Path
    alice: str
    local: str

    def get(self, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.rig.http.get(path, headers=named)

    def capabilities(self, **headers: str) -> httpx.Response:
        return self.get("/api/v1/get_server_capabilities", **headers)


@pytest.fixture
def guarded(redis_url: str, engine_name: str, tmp_path: Path) -> Iterator[Guarded]:
    made = {name: mint(TenantId(name), created_ms=0) for name in ("alice", "local")}
    file = tmp_path / "keys.json"
    change_keys(file, lambda _: [key.stored for key in made.values()])
    with running_rig(redis_url, engine=engine_name, config=replace(FAST, keys_file=file)) as rig:
        yield Guarded(rig=rig, file=file, alice=made["alice"].text, local=made["local"].text)


def test_either_header_lets_a_key_in(guarded: Guarded) -> None:
    assert guarded.capabilities(x_api_key=guarded.alice).status_code == 200
    assert guarded.capabilities(authorization=f"Bearer {guarded.alice}").status_code == 200


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        ({}, "no API key: send it as X-API-Key"),
        ({"authorization": "Basic eA=="}, "no API key"),
        ({"x_api_key": "tml-anything"}, "this API key is not known here"),
        ({"authorization": "Bearer tml-00000000-" + 48 * "0"}, "this API key is not known here"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/api/v1/get_server_capabilities", "/api/v1/nothing", "/metrics", "/api/v1/healthz/x"]
)
def test_without_a_good_key_every_path_answers_401_with_the_reason(
    guarded: Guarded, path: str, headers: dict, detail: str
) -> None:
    response = guarded.get(path, **headers)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert (response.json()["error"], response.json()["category"]) == ("unauthorized", "user")
    assert response.json()["detail"].startswith(detail)


def test_a_body_is_not_waited_for_before_the_key_is_known_to_be_good(guarded: Guarded) -> None:
    head = "POST /api/v1/forward_backward HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\nx-api-key: tml-wrong\r\n\r\n"
    url = httpx.URL(guarded.rig.base_url)
    assert url.port is not None
    with socket.create_connection((url.host, url.port), timeout=_DEADLINE_S) as connection:
        connection.sendall(head.encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 401 ")


def test_health_and_documentation_need_no_key(guarded: Guarded) -> None:
    for path in ("/api/v1/healthz", "/openapi.json", "/docs"):
        assert guarded.get(path).status_code == 200


def test_a_download_needs_only_its_unguessable_url(guarded: Guarded) -> None:
    response = guarded.get("/api/v1/downloads/guessed/adapter_model.safetensors")
    assert response.status_code == 404


def test_metrics_are_for_the_machines_own_tenant(guarded: Guarded) -> None:
    assert guarded.get("/metrics", x_api_key=guarded.alice).status_code == 403
    assert "gradstream_api_requests_total" in guarded.get("/metrics", x_api_key=guarded.local).text


def test_revoking_and_adding_count_without_a_restart(guarded: Guarded) -> None:
    bob = mint(TenantId("bob"), created_ms=0)
    change_keys(guarded.file, lambda keys: [keys[1], bob.stored])
    deadline = time.monotonic() + _DEADLINE_S
    while guarded.capabilities(x_api_key=guarded.alice).status_code != 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert guarded.capabilities(x_api_key=bob.text).status_code == 200
    assert guarded.capabilities(x_api_key=guarded.local).status_code == 200


def until_limited(ask: Callable[..., httpx.Response]) -> list[httpx.Response]:
    """The answers to requests with a wrong key, the last of which is the first that is turned away for their number."""
    answers = [ask(x_api_key="tml-wrong")]
    while answers[-1].status_code != 429:
        assert len(answers) < 1000
        answers.append(ask(x_api_key="tml-wrong"))
    return answers


def test_failures_are_answered_at_a_bounded_rate_and_lock_nobody_out(guarded: Guarded) -> None:
    *answered, limited = until_limited(guarded.capabilities)
    assert len(answered) >= _BURST
    assert {answer.status_code for answer in answered} == {401}
    assert limited.headers["retry-after"] == "3"
    assert guarded.capabilities(x_api_key=guarded.alice).status_code == 200


def test_wrong_keys_are_counted_where_none_is_needed_but_more_is_told_with_one(guarded: Guarded) -> None:
    *answered, _ = until_limited(functools.partial(guarded.get, "/health"))
    assert len(answered) >= _BURST
    # They are the same failures: a bucket that is full again would answer as many once more.
    assert len(until_limited(guarded.capabilities)) < _BURST
    status = answered[0].status_code
    assert guarded.get("/health").status_code == status
    assert guarded.get("/health", x_api_key=guarded.alice).status_code == status


def test_no_key_is_ever_repeated(guarded: Guarded, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = guarded.alice[:-1] + ("0" if guarded.alice[-1] != "0" else "1")
    texts = []
    for headers in ({"x_api_key": wrong}, {"authorization": f"Bearer {wrong}"}, {"x_api_key": guarded.alice}):
        response = guarded.capabilities(**headers)
        texts += [response.text, str(response.headers)]
    texts.append(guarded.get("/metrics", x_api_key=guarded.local).text)
    printed = capfd.readouterr()
    assert "auth_failed" in printed.out + printed.err
    for secret in (guarded.alice, wrong, guarded.local):
        assert all(secret.rpartition("-")[2] not in text for text in (*texts, printed.out, printed.err))


def test_without_keys_a_page_of_another_site_is_turned_away(rig: Rig) -> None:
    path = "/api/v1/get_server_capabilities"
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
        response = rig.http.get(path, headers=headers)
        assert (response.status_code, response.json()["error"]) == (403, "forbidden")
    assert rig.http.get(path, headers={"x-api-key": "tml-anything", "host": "localhost:80"}).status_code == 200


def test_a_server_that_is_meant_to_be_open_answers_under_any_name(redis_url: str, engine_name: str) -> None:
    with running_rig(redis_url, engine=engine_name, config=replace(FAST, is_open=True)) as rig:
        assert rig.http.get("/api/v1/get_server_capabilities", headers={"host": "box.example"}).status_code == 200
