"""gradstream keys: made once, listed without secrets, revoked by id."""

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradstream.shared.keys import KeyRing, read_keys
from gradstream.worker.cli import app

RUNNER = CliRunner()
ROOT = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def keys(*arguments: object):
    return RUNNER.invoke(app, ["keys", *map(str, arguments)])


def added(file: Path, tenant: str = "alice") -> str:
    result = keys("add", tenant, "--file", file)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_an_added_key_is_printed_alone_and_works(file: Path) -> None:
    text = added(file)
    assert KeyRing(read_keys(file)).tenant_of(text) == "alice"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_list_names_every_key_and_shows_no_secret(file: Path) -> None:
    texts = [added(file, tenant) for tenant in ("alice", "bob", "alice")]
    lines = keys("list", "--file", file).stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["alice", "bob", "alice"]
    assert [line.split()[0] for line in lines] == [text.split("-")[1] for text in texts]
    assert all(text.rpartition("-")[2] not in line for text in texts for line in lines)


def test_a_revoked_key_is_gone_and_the_others_stay(file: Path) -> None:
    first, second = added(file), added(file)
    assert keys("revoke", first.split("-")[1], "--file", file).exit_code == 0
    ring = KeyRing(read_keys(file))
    assert (ring.tenant_of(first), ring.tenant_of(second)) == (None, "alice")


def test_a_whole_key_as_argument_is_refused_without_repeating_it(file: Path) -> None:
    text = added(file)
    result = keys("revoke", text, "--file", file)
    assert result.exit_code == 2
    assert text not in result.output
    assert len(read_keys(file)) == 1


def test_the_config_can_name_the_file(file: Path, tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"model_path: x/y\nenable_lora: true\napi_keys_file: {file}\n")
    assert keys("add", "alice", "--config", config).exit_code == 0
    assert len(read_keys(file)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "alice"], "--file, --config: give one of the two"),
        (["add", "a b", "--file", "FILE"], "tenant 'a b': use 1 to 64 letters"),
        (["add", "alice", "--config", "configs/tiny.yaml"], "sets no api_keys_file"),
        (["add", "alice", "--file", "FILE/none/keys"], "cannot be written"),
        (["list", "--file", "FILE"], "is not there; make it with `gradstream keys add TENANT"),
        (["revoke", "12345678", "--file", "FILE"], "has no key '12345678'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    result = keys(*[argument.replace("FILE", str(file)) for argument in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_serve_without_keys_refuses_an_address_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = RUNNER.invoke(app, ["serve", "--config", "configs/tiny.yaml", "--api-host", "0.0.0.0"])  # noqa: S104
    assert result.exit_code == 2
    assert "api_host: 0.0.0.0 can be reached from other machines, and there are no API keys" in result.stderr
