"""Configs whose gang is on another machine, and where their Redis is."""

from pathlib import Path

import msgspec
import pytest

from gradstream.shared.config import ConfigError, Settings
from gradstream.shared.config.machine import Machine, redis_url_of_environment
from gradstream.shared.config.remote import resolve_for_gang_elsewhere, with_redis_url

MODEL = str(Path(__file__).parents[3] / "tests/models/tiny-qwen3-shakespeare")
NO_GPU = Machine(num_cores=2, has_cuda=False, cache_dir=Path(MODEL))


def settings(**values: object) -> Settings:
    given = {"model_path": MODEL, "enable_lora": True, **values}
    return msgspec.convert({**given, "explicit": sorted(given)}, Settings)


@pytest.mark.config_field("device", "init_device")
def test_a_head_without_a_gpu_takes_a_config_that_needs_one() -> None:
    for values in ({"device": "cuda"}, {"init_device": "cuda"}):
        assert resolve_for_gang_elsewhere(settings(**values), NO_GPU).settings.device == "cuda"


def test_a_head_without_a_gpu_is_not_given_one_needlessly() -> None:
    assert resolve_for_gang_elsewhere(settings(), NO_GPU).settings.device == "cpu"


def test_what_no_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="attn_implementation"):
        resolve_for_gang_elsewhere(settings(device="cpu", attn_implementation="flash_attention_3"), NO_GPU)
    with pytest.raises(ConfigError, match="pipeline_parallel_size"):
        resolve_for_gang_elsewhere(settings(pipeline_parallel_size=3), NO_GPU)


def test_a_url_of_the_environment_stands_in_for_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTREAM_REDIS_URL", "redis://:secret@h/0")
    found = with_redis_url(settings(), redis_url_of_environment(), place="GRADSTREAM_REDIS_URL")
    assert found.redis_url == "redis://:secret@h/0"
    assert "redis_url" in found.explicit


def test_a_url_that_is_none_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match=r"^WHERE: redis_url: the value is not text that matches") as caught:
        with_redis_url(settings(), "http://:secret@h", place="WHERE")
    assert "secret" not in str(caught.value)
