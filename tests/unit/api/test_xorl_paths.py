"""Every spelling of a checkpoint means the one that the records know."""

from pathlib import Path

import pytest

from gradstream.api.names import shown, target
from gradstream.api.xorl.paths import parse, parse_id
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import LOCAL_TENANT, TenantId

OUTPUT = Path("/srv/outputs/run")
MINE = target("policy", tenant=LOCAL_TENANT)


def uri(text: str, *, of=MINE, kind: str = "weights", output_dir: Path | None = OUTPUT) -> str:
    return parse(text, of=of, kind=kind, field="path", output_dir=output_dir).uri


@pytest.mark.parametrize(
    "text",
    [
        "xorl://policy/weights/n",
        "tinker://policy/weights/n",
        "weights/policy/n",
        "policy/weights/n",
        "weights/n",
        "policy/n",
        "n",
        "/srv/outputs/run/weights/policy/n",
        "/srv/outputs/run/weights/policy/n/",
        "/srv/outputs/other/../run/weights/policy/n",
        "/srv/outputs/run/checkpoints/policy/weights/n",
    ],
)
def test_every_spelling_means_the_same_checkpoint(text: str) -> None:
    assert uri(text) == "tinker://policy/weights/n"


def test_a_path_relative_to_where_the_server_runs_is_one_below_its_output_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "outputs/server_run/weights/default/step_42"
    assert uri(text, output_dir=tmp_path / "outputs" / "server_run") == "tinker://default/weights/step_42"


def test_names_of_another_tenants_models_mean_its_own() -> None:
    alices = target("policy", tenant=TenantId("alice"))
    for text in ("xorl://policy/weights/n", "weights/n", "policy/n", "n", "weights/policy/n"):
        assert uri(text, of=alices) == "tinker://alice:policy/weights/n"
    assert uri("/srv/outputs/run/checkpoints/alice+policy/weights/n", of=alices) == "tinker://alice:policy/weights/n"


def test_another_model_is_meant_when_it_is_named() -> None:
    assert uri("xorl://other/weights/n") == uri("other/n") == uri("weights/other/n") == "tinker://other/weights/n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "xorl://",
        "xorl://policy",
        "xorl://policy/n",
        "xorl://policy/weights/n/more",
        "xorl://policy/weights/..",
        "../n",
        "a/b/c",
        "po licy/n",
        "/etc/passwd",
        "/srv/outputs/run/../secret/weights/policy/n",
        "/srv/outputs/running/weights/policy/n",
        "/srv/outputs/run/logs/a/b/c",
        "outputs/run/weights/policy/n",
        "weights/policy/n\n",
        "w" * 10_000,
    ],
)
def test_what_names_no_checkpoint_is_refused_with_the_field_and_the_form(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"path: .* has the form xorl://MODEL/weights/NAME"):
        uri(text)


def test_who_names_a_path_elsewhere_hears_where_it_may_lie() -> None:
    with pytest.raises(InvalidRequest, match=r"or is a path below the server's output_dir$"):
        uri("outputs/server_run/weights/default/step_42")


def test_a_path_of_the_machine_means_nothing_where_the_output_directory_is_not_known() -> None:
    with pytest.raises(InvalidRequest):
        uri("/srv/outputs/run/weights/policy/n", output_dir=None)


def test_a_checkpoint_of_another_kind_is_refused_by_its_kind() -> None:
    with pytest.raises(InvalidRequest, match="of kind 'sampler_weights'; this call takes 'weights'"):
        uri("xorl://policy/sampler_weights/n")
    assert uri("xorl://policy/sampler_weights/n", kind="sampler_weights").endswith("/sampler_weights/n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weights/n", "tinker://policy/weights/n"),
        ("weights/other/n", "tinker://other/weights/n"),
        ("sampler_weights/n", "tinker://policy/sampler_weights/n"),
        ("xorl://other/external_weights/n", "tinker://other/external_weights/n"),
        ("tinker://other/weights/n", "tinker://other/weights/n"),
        ("tinker://s:train:1/weights/n", "tinker://s:train:1/weights/n"),
    ],
)
def test_an_id_names_kind_and_checkpoint(text: str, expected: str) -> None:
    assert parse_id(text, of=MINE, field="checkpoint_id").uri == expected


@pytest.mark.parametrize("text", ["n", "other/n", "a/b/weights/n", ""])
def test_an_id_without_a_kind_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"checkpoint_id: .* has the form KIND/NAME"):
        parse_id(text, of=MINE, field="checkpoint_id")


def test_stored_paths_are_shown_by_the_names_of_models() -> None:
    text = "no 'tinker://alice:policy/weights/n' beside tinker://default/weights/m; tinker://s:train:1/weights/k"
    shown_text = "no 'xorl://policy/weights/n' beside xorl://default/weights/m; xorl://s:train:1/weights/k"
    assert shown(text) == shown_text
