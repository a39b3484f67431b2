"""Which address a server may listen on, with keys and without."""

from pathlib import Path

import msgspec
import pytest

from gradstream.shared.config import ConfigError, Settings, resolve
from gradstream.shared.config.access import is_loopback
from gradstream.shared.config.machine import Machine

EVERYWHERE = "0.0.0.0"  # noqa: S104 - what is refused here
MODEL = str(Path(__file__).parents[3] / "tests/models/tiny-qwen3-shakespeare")


def resolved(tmp_path: Path, **values: object) -> Settings:
    given = {"model_path": MODEL, "enable_lora": True, **values}
    settings = msgspec.convert({**given, "explicit": sorted(given)}, Settings)
    return resolve(settings, Machine(num_cores=2, has_cuda=False, cache_dir=tmp_path)).settings


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.8.7", "::1", "[::1]", "localhost", "api.localhost")),
        *(
            (host, False)
            for host in (EVERYWHERE, "::", "10.0.0.1", "example.com", "localhost.example.com", "", "127.1")
        ),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize("host", [EVERYWHERE, "::", "192.168.1.4", "box.example.com"])
def test_without_keys_other_machines_are_not_answered(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=f"api_host: {host} can be reached from other machines.*gradstream keys add"):
        resolved(tmp_path, api_host=host)
    assert resolved(tmp_path, api_host=host, api_without_keys=True).api_host == host


def test_with_keys_any_address_will_do_and_the_path_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    settings = resolved(tmp_path, api_host=EVERYWHERE, api_keys_file="keys.json")
    assert settings.api_keys_file == str((tmp_path / "keys.json").resolve())


def test_a_key_file_that_is_not_there_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(ConfigError, match=f"is not a file; make it with `gradstream keys add TENANT --file {path}`"):
        resolved(tmp_path, api_keys_file=str(path))


def test_the_room_for_bodies_holds_the_largest_one_in_a_tenants_half(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_inflight_body_bytes: 4000 is below 8000, four of the largest bodies"):
        resolved(tmp_path, max_body_bytes=2000, max_json_body_bytes=1024, max_inflight_body_bytes=4000)


def test_keys_and_doing_without_them_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{}")
    with pytest.raises(ConfigError, match="api_without_keys: true contradicts api_keys_file"):
        resolved(tmp_path, api_keys_file=str(tmp_path / "keys.json"), api_without_keys=True)
