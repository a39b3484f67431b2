"""Checkpoints leave the server: exports by plain GETs, archives for older clients, and nobody gets what is not theirs."""

import io
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest
import tinker
from click.testing import CliRunner
from tests.support.cards import MODEL_NAME
from tests.support.rig import FAST, Rig, running_rig
from tinker.cli.__main__ import main_cli

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def rig(redis_url: str, engine_name: str, tmp_path: Path) -> Iterator[Rig]:
    """A server that shares an output directory with its worker."""
    with running_rig(redis_url, engine=engine_name, config=replace(FAST, output_dir=tmp_path)) as running:
        yield running


@pytest.fixture
def sdk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    monkeypatch.setenv("TINKER_BASE_URL", rig.base_url)
    client = tinker.ServiceClient()
    yield client
    client.holder.close()


@pytest.fixture
def training(sdk: tinker.ServiceClient) -> tinker.TrainingClient:
    return sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)


@pytest.fixture
def export(training: tinker.TrainingClient) -> str:
    """The path of an export."""
    return training.save_weights_external("out").result().path


def url_of(path: str, suffix: str) -> str:
    run, _, checkpoint = path.removeprefix("tinker://").partition("/")
    return f"/api/v1/training_runs/{run}/checkpoints/{checkpoint}{suffix}"


def test_an_exports_files_come_by_plain_gets_with_their_lengths(
    sdk: tinker.ServiceClient, export: str, training: tinker.TrainingClient
) -> None:
    assert export == f"tinker://{training.model_id}/external_weights/out"
    found = sdk.create_rest_client().get_external_weights_urls(export).result()
    assert set(found.urls) == {CONFIG, WEIGHTS}
    assert found.expires - datetime.now(UTC) > timedelta(minutes=30)
    for name, url in found.urls.items():
        with urllib.request.urlopen(url) as response:  # noqa: S310  as the command line does
            content = response.read()
            assert int(response.headers["Content-Length"]) == len(content)
        assert content.decode() == f"{name} of {export}"


def test_the_command_line_downloads_a_training_checkpoint_and_cleans_up(
    sdk: tinker.ServiceClient, training: tinker.TrainingClient, tmp_path: Path
) -> None:
    path = training.save_state("a").result().path
    target = tmp_path / "here"
    result = CliRunner().invoke(main_cli, ["checkpoint", "download", path, "--output", str(target)])
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in target.rglob("*") if file.is_file()) == [CONFIG, WEIGHTS]
    left = sdk.create_rest_client().list_user_checkpoints().result().checkpoints
    assert [item.tinker_path for item in left] == [path]


def test_a_url_ends_with_its_checkpoint(rig: Rig, sdk: tinker.ServiceClient, export: str) -> None:
    rest = sdk.create_rest_client()
    url = rest.get_external_weights_urls(export).result().urls[CONFIG]
    rest.delete_checkpoint_from_tinker_path(export).result()
    assert rig.http.get(url).status_code == 404


@pytest.mark.parametrize(
    "name", ["none", "", "../adapter_config.json", "%2e%2e/%2e%2e/%2e%2e/x", "%2fetc%2fpasswd", "adapter_config.json/x"]
)
def test_a_token_gives_its_own_checkpoints_files_only(
    sdk: tinker.ServiceClient, export: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / "x").write_text("secret")
    url = sdk.create_rest_client().get_external_weights_urls(export).result().urls[CONFIG]
    answer = httpx.get(url.removesuffix(CONFIG) + name, follow_redirects=True, timeout=60)
    assert answer.status_code == 404
    assert "secret" not in answer.text


def test_a_made_up_token_gives_nothing(rig: Rig) -> None:
    for token in ("0" * 64, "x", "..", "a%0ab"):
        assert rig.http.get(f"/api/v1/downloads/{token}/{CONFIG}").status_code == 404


def test_a_link_out_of_the_directory_is_not_followed(
    rig: Rig, sdk: tinker.ServiceClient, export: str, tmp_path: Path
) -> None:
    url = sdk.create_rest_client().get_external_weights_urls(export).result().urls[CONFIG]
    (tmp_path / "secret").write_text("secret")
    (file,) = tmp_path.rglob(CONFIG)
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    assert rig.http.get(url).status_code == 404


def test_urls_are_given_for_exports_only(rig: Rig, training: tinker.TrainingClient) -> None:
    path = training.save_state("a").result().path
    answer = rig.http.get(url_of(path, "/external_weights_urls"))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    missing = rig.http.get(url_of(path.replace("weights/a", "external_weights/a"), "/external_weights_urls"))
    assert missing.status_code == 404


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_an_archive_is_a_redirect_to_a_tar_of_all_files(rig: Rig, training: tinker.TrainingClient, kind: str) -> None:
    saved = training.save_state("a") if kind == "weights" else training.save_weights_for_sampler("a")
    path = saved.result().path
    answer = rig.http.get(url_of(path, "/archive"), headers={"accept": "application/gzip"})
    assert answer.status_code == 302
    assert parsedate_to_datetime(answer.headers["expires"]) > datetime.now(UTC) + timedelta(minutes=30)
    content = httpx.get(answer.headers["location"], timeout=60)
    assert int(content.headers["content-length"]) == len(content.content)
    with tarfile.open(fileobj=io.BytesIO(content.content), mode="r:*") as tar:
        assert tar.getnames() == [CONFIG, WEIGHTS]
        file = tar.extractfile(WEIGHTS)
        assert file is not None
        assert file.read().decode() == f"{WEIGHTS} of {path}"


def test_an_archive_of_a_checkpoint_that_there_is_not_is_a_404(rig: Rig) -> None:
    assert rig.http.get("/api/v1/training_runs/a:train:0/checkpoints/weights/none/archive").status_code == 404


def test_encryption_of_an_export_is_refused_and_its_seq_counts_as_used(rig: Rig) -> None:
    model = rig.model()
    body = {"model_id": model, "seq_id": 1, "path": "x", "age_encryption_recipients": ["age1abc"]}
    answer = rig.post("save_weights_external", body)
    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported")
    assert "encryption" in answer.json()["detail"]
    assert rig.result(rig.ok(rig.step(model, 2))["request_id"])


def test_a_process_that_cannot_see_the_files_says_so(redis_url: str, engine_name: str) -> None:
    with running_rig(redis_url, engine=f"{engine_name}-blind", config=FAST) as rig:
        model = rig.model()
        saved = rig.ok(rig.post("save_weights_external", {"model_id": model, "seq_id": 1, "path": "x"}))
        path = rig.result(saved["request_id"])["path"]
        answer = rig.http.get(url_of(path, "/external_weights_urls"))
        assert (answer.status_code, answer.json()["error"]) == (400, "unsupported")
        assert "output_dir" in answer.json()["detail"]
