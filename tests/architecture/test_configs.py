"""Every config in configs/ is complete: it loads, and it resolves on a machine without a GPU."""

from pathlib import Path

import pytest

from gradstream.shared.config import load_settings, resolve
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.resolve import PACKAGED_MODELS

REPOSITORY = Path(__file__).parent.parent.parent
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture
def machine(tmp_path) -> Machine:
    """Two cores, no GPU, and every packaged model in the cache (its config only, which is all that resolving looks at)."""
    for folder in PACKAGED_MODELS.values():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}", encoding="utf-8")
    return Machine(num_cores=2, has_cuda=False, cache_dir=tmp_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_resolves_on_a_machine_without_a_gpu(path, machine, monkeypatch):
    monkeypatch.chdir(REPOSITORY)

    resolved = resolve(load_settings(path), machine)

    assert resolved.settings.device == "cpu"


def test_the_configs_that_the_documents_name_exist():
    assert {"tiny", "demo", "compose"} <= {path.stem for path in CONFIGS}
