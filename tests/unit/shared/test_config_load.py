"""A config file and overrides become settings; each mistake is named with its place and its remedy."""

from pathlib import Path

import pytest

from gradstream.shared.config import ConfigError, Settings, load_settings

GOOD = "model_path: tests/models/tiny-qwen3-shakespeare\nenable_lora: true\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text)
    return path


def problem_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(folder, text), overrides)
    assert len(caught.value.problems) == 1
    return str(caught.value).replace(str(folder), "DIR")


def test_a_file_sets_its_fields_and_leaves_the_others_at_their_defaults(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, GOOD + "lora_alpha: 8\nstorage_limit: 1.5GB\nmodel_aliases: [a, b/c]\n"))
    assert (settings.lora_alpha, settings.storage_limit, settings.model_aliases) == (
        8.0,
        3 * 512 * 1024**2,
        ["a", "b/c"],
    )
    assert settings.explicit == {"model_path", "enable_lora", "lora_alpha", "storage_limit", "model_aliases"}
    assert settings.lora_rank == Settings(model_path="x").lora_rank


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param(
            "lora_rnk: 3", "DIR/server.yaml:3: unknown field 'lora_rnk'; did you mean lora_rank?", id="near-name"
        ),
        pytest.param(
            "zzzz: 3", "DIR/server.yaml:3: unknown field 'zzzz'; docs/config.md lists all fields", id="no-near-name"
        ),
        pytest.param(
            "enable_lora: false",
            "DIR/server.yaml:3: enable_lora is set twice; the first one is DIR/server.yaml:2",
            id="duplicate",
        ),
        pytest.param("lora_rank: 0", "DIR/server.yaml:3: lora_rank: 0 is not an integer from 1 to 512", id="too-low"),
        pytest.param(
            "lora_rank: 1.5", "DIR/server.yaml:3: lora_rank: 1.5 is not an integer from 1 to 512", id="fraction"
        ),
        pytest.param(
            "api_port: yes", "DIR/server.yaml:3: api_port: true is not an integer from 1 to 65535", id="boolean"
        ),
        pytest.param("seed:", "DIR/server.yaml:3: seed: null is not an integer at least 0", id="nothing"),
        pytest.param("lora_alpha: .inf", "DIR/server.yaml:3: lora_alpha: inf is not a number above 0", id="infinite"),
        pytest.param(
            "durability: allways",
            "DIR/server.yaml:3: durability: 'allways' is not one of always, everysec, none",
            id="choice",
        ),
        pytest.param(
            "storage_limit: 10 parsecs",
            "DIR/server.yaml:3: storage_limit: '10 parsecs' is not a size such as 512MB at least 1",
            id="size",
        ),
        pytest.param("model_aliases: a", "DIR/server.yaml:3: model_aliases: 'a' is not a list of texts", id="no-list"),
        pytest.param(
            "redis_url: http://x",
            "DIR/server.yaml:3: redis_url: 'http://x' is not text that matches ^(redis|rediss|unix)://, or null",
            id="scheme",
        ),
        pytest.param("explicit: [seed]", "DIR/server.yaml:3: unknown field 'explicit'", id="handed-down"),
        pytest.param("lease_owner: me", "DIR/server.yaml:3: unknown field 'lease_owner'", id="lease"),
        pytest.param("seed: !!python/object:os.system x", "DIR/server.yaml:3: seed: ", id="python-tag"),
        pytest.param("seed: [1", "DIR/server.yaml:4: not valid YAML: ", id="broken"),
        pytest.param(
            "seed: 2020-13-45", "DIR/server.yaml:3: seed: '2020-13-45' is not an integer at least 0", id="date"
        ),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    assert problem_of(tmp_path, GOOD + line + "\n").startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "DIR/server.yaml: model_path is missing: ", id="empty"),
        pytest.param("- a\n", "DIR/server.yaml:1: the file must be flat `field: value` lines", id="list"),
        pytest.param("enable_lora: true\n", "DIR/server.yaml: model_path is missing: ", id="required"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert problem_of(tmp_path, text).startswith(message)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_settings(tmp_path / "none.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"server\.yaml: cannot be read: not UTF-8 text"):
        load_settings(tmp_path / "server.yaml")


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, GOOD + "a: 1\nseed: x\n"), ["--server.b", "1"])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        pytest.param(["--server.seed", "7"], "seed", 7, id="space"),
        pytest.param(["--server.seed=7"], "seed", 7, id="equals"),
        pytest.param(["--server.idle_session_timeout", "1e3"], "idle_session_timeout", 1000.0, id="exponent"),
        pytest.param(["--server.enable_packing", "false"], "enable_packing", False, id="false"),
        pytest.param(["--server.batch_isolation=strict"], "batch_isolation", "strict", id="choice"),
        pytest.param(["--server.cp_fsdp_mode", "none"], "cp_fsdp_mode", "none", id="word-none"),
        pytest.param(["--server.model_name", "007"], "model_name", "007", id="digits-as-text"),
        pytest.param(["--server.model_name", "a: b"], "model_name", "a: b", id="colon-as-text"),
        pytest.param(["--server.model_name=null"], "model_name", None, id="null"),
        pytest.param(["--server.model_aliases", "[x, y]"], "model_aliases", ["x", "y"], id="list"),
        pytest.param(["--server.max_body_bytes", "1MB"], "max_body_bytes", 1024**2, id="size"),
        pytest.param(["--server.max_body_bytes=4096"], "max_body_bytes", 4096, id="bytes"),
        pytest.param(["--server.enable_compile", "--server.seed", "1"], "enable_compile", True, id="bare-flag"),
        pytest.param(
            ["--server.redis_url=redis://:p=w@h:1/0"], "redis_url", "redis://:p=w@h:1/0", id="equals-in-value"
        ),
    ],
)
def test_an_override_wins_over_the_file(tmp_path: Path, overrides: list[str], field: str, value: object) -> None:
    settings = load_settings(write(tmp_path, GOOD + "seed: 3\n"), overrides)
    assert getattr(settings, field) == value
    assert field in settings.explicit


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["--server.durabilty", "x"],
            "--server.durabilty: unknown field 'durabilty'; did you mean durability?",
            id="near",
        ),
        pytest.param(["--server.seed"], "--server.seed: needs a value: an integer at least 0", id="no-value"),
        pytest.param(["--server.seed", "x"], "--server.seed: seed: 'x' is not an integer at least 0", id="wrong"),
        pytest.param(["--server.seed", "-1"], "--server.seed: seed: -1 is not an integer at least 0", id="negative"),
        pytest.param(["--server.seed=1", "--server.seed=2"], "--server.seed: is given twice", id="twice"),
        pytest.param(["--sever.seed=1"], "--sever.seed=1: unknown argument", id="prefix"),
        pytest.param(["stray"], "stray: unknown argument", id="stray"),
        pytest.param(
            ["--server.model_aliases=[x"],
            "--server.model_aliases: model_aliases: '[x' is not a list of texts",
            id="broken-yaml",
        ),
    ],
)
def test_a_mistake_in_an_override_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert problem_of(tmp_path, GOOD, *overrides).startswith(message)
