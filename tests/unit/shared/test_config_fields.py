"""The table of fields: complete, documented, handed down unchanged."""

import stat
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gradstream.shared.config import ConfigError, Settings, load_settings, read_handover, resolve, write_handover
from gradstream.shared.config.docs import as_markdown, as_yaml
from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.settings import GROUPS
from gradstream.shared.config.sizes import format_size, parse_size
from gradstream.shared.config.support import supported_values

ROOT = Path(__file__).parents[3]
SEED: dict[str, object] = yaml.safe_load(Path(__file__).with_name("seed_fields.yaml").read_text())
MACHINE = Machine(num_cores=2, has_cuda=False, cache_dir=ROOT)


@pytest.mark.parametrize("name", SEED)
def test_a_field_of_the_reference_is_known_with_its_default(name: str) -> None:
    expected = SEED[name]
    if expected == "required":
        assert FIELDS[name].is_required
    else:
        assert FIELDS[name].default == (parse_size(str(expected)) if FIELDS[name].is_size else expected)


def test_every_field_says_what_it_is_and_what_it_takes() -> None:
    for field in FIELDS.values():
        assert field.doc.endswith("."), field.name
        assert field.expected(), field.name
        assert field.group, field.name


def test_every_group_starts_at_a_field_and_comes_once() -> None:
    assert list(dict.fromkeys(field.group for field in FIELDS.values())) == [title for title, _ in GROUPS]


def test_support_is_declared_for_known_fields_only() -> None:
    for device in ("cpu", "cuda"):
        assert supported_values(device).keys() <= FIELDS.keys()


def test_the_reference_has_a_column_for_tests_only_when_they_are_known() -> None:
    assert "| tested |" not in as_markdown()
    assert "| an integer at least 0 | somewhere |\n" in as_markdown(tested={"seed": "somewhere"})


def test_shown_settings_load_again_as_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [
        "--server.output_dir",
        str(tmp_path),
        "--server.redis_url=redis://h/0",
        "--server.model_aliases=['a: b', '007']",
    ]
    first = resolve(load_settings(ROOT / "configs/tiny.yaml", overrides), MACHINE).settings
    text = as_yaml(first)
    values = yaml.safe_load(text)
    assert values["model_aliases"] == ["a: b", "007"]
    (tmp_path / "shown.yaml").write_text(text)
    again = resolve(load_settings(tmp_path / "shown.yaml"), MACHINE).settings
    for name in FIELDS:
        assert getattr(again, name) == getattr(first, name), name


def test_a_shown_password_is_hidden() -> None:
    shown = as_yaml(Settings(model_path="m", redis_url="rediss://me:secret@host:1/2"))
    assert "secret" not in shown
    assert "rediss://me:***@host:1/2" in shown


def test_settings_are_handed_down_whole_and_privately(tmp_path: Path) -> None:
    settings = Settings(
        model_path="m", lease_owner="me", explicit=frozenset({"model_path"}), foundation={"a": [1]}, lora_alpha=0.1
    )
    path = tmp_path / "settings.json"
    path.write_text("old")
    write_handover(settings, path)
    assert read_handover(path) == settings
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"model_path": "m", "other": 1}'], ids=["empty", "cut", "bare", "unknown"]
)
def test_a_broken_handover_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ConfigError, match="not the settings of this version"):
        read_handover(tmp_path / "settings.json")


@given(st.integers(min_value=0, max_value=2**60))
def test_a_size_survives_being_written_and_read(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("1k", 1024), ("1.5 GB", 3 * 512 * 1024**2), ("2TiB", 2 * 1024**4), ("7", 7), ("7B", 7)]
)
def test_a_size_is_read_in_the_usual_spellings(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 EB", "1,5GB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
