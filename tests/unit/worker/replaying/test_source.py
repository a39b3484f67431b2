"""A log without a base model is refused with what helps."""

from pathlib import Path

import pytest

from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.source import Source, engine_settings


def refusal(tmp_path: Path, *, is_export: bool) -> str:
    source = Source(
        name="log", log=DiskLog(tmp_path), snapshots=None, checkpoints=None, settings=None, is_export=is_export
    )
    with pytest.raises(CannotReplay) as refused:
        engine_settings(source, fingerprint="", base_models=["tiny"], output_dir=tmp_path)
    return str(refused.value)


def test_an_exported_log_without_a_model_names_the_option_and_the_model(tmp_path: Path):
    text = refusal(tmp_path, is_export=True)
    assert text.startswith("an exported log does not hold the base model (tiny): give --model-path DIR")


def test_a_servers_log_without_its_settings_asks_for_its_config(tmp_path: Path):
    assert "give --config FILE (what it was started with) or --model-path DIR" in refusal(tmp_path, is_export=False)
