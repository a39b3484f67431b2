"""Every config in configs/ is complete: it loads, and it resolves on the machine that it is for."""

from pathlib import Path

import pytest

from gradstream.shared.config import ConfigError, Settings, load_settings, resolve
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.resolve import PACKAGED_MODELS
from gradstream.worker.parts import engine_config, lead_options

REPOSITORY = Path(__file__).parent.parent.parent
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
FOR_GPUS = {"qwen3_8b_lora", "qwen3_8b_full", "qwen3_30b_a3b_lora"}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def machine(cache_dir: Path, *, has_cuda: bool) -> Machine:
    """Two cores, and every packaged model in the cache (its config only, which is all that resolving looks at)."""
    for folder in PACKAGED_MODELS.values():
        (cache_dir / folder).mkdir(parents=True, exist_ok=True)
        (cache_dir / folder / "config.json").write_text("{}", encoding="utf-8")
    return Machine(num_cores=2, has_cuda=has_cuda, cache_dir=cache_dir)


def loaded(path: Path, cache_dir: Path) -> Settings:
    return resolve(load_settings(path), machine(cache_dir, has_cuda=path.stem in FOR_GPUS)).settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_resolves_on_the_machine_that_it_is_for(path, tmp_path):
    settings = loaded(path, tmp_path)

    assert settings.device == ("cuda" if path.stem in FOR_GPUS else "cpu")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_parts_of_the_gang_take_every_config(path, tmp_path):
    settings = loaded(path, tmp_path)

    assert engine_config(settings, model_path=tmp_path).is_lora == settings.enable_lora
    assert lead_options(settings).limits.batch_tokens >= 16


@pytest.mark.parametrize("name", sorted(FOR_GPUS))
def test_a_config_for_a_gpu_says_so_on_a_machine_without_one(name, tmp_path):
    with pytest.raises(ConfigError, match=r"^device: 'cuda' needs an NVIDIA GPU"):
        resolve(load_settings(REPOSITORY / "configs" / f"{name}.yaml"), machine(tmp_path, has_cuda=False))


def test_servers_that_run_side_by_side_write_to_places_of_their_own(tmp_path):
    places = [loaded(path, tmp_path).output_dir for path in CONFIGS]

    assert len(set(places)) == len(places)


def test_the_configs_that_the_documents_name_exist():
    assert {"tiny", "tiny_full", "tiny_moe", "demo", "demo_full", "compose"} | FOR_GPUS == {
        path.stem for path in CONFIGS
    }
