"""How a rank that somebody starts by hand comes to its settings."""

from pathlib import Path

import pytest

from gradstream.engine.parallel.comm import Comm
from gradstream.shared.config import ConfigError, Problem, Settings
from gradstream.shared.config.machine import LaunchedPlace, Machine
from gradstream.shared.errors import Unavailable
from gradstream.worker.joining import agree, settings_by_hand

MODEL = Path(__file__).parents[3] / "tests/models/tiny-qwen3-shakespeare"
TWO_OF_FOUR = LaunchedPlace(rank=1, size=4, local_size=2)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"model_path: {MODEL}\nenable_lora: true\noutput_dir: {tmp_path / 'out'}\ndevice: cpu\n")
    return path


def by_hand(
    config: Path, *overrides: str, redis_url: str | None = None, place: LaunchedPlace | None = None
) -> Settings:
    return settings_by_hand(config, overrides, redis_url=redis_url, place=place)


def test_the_cores_of_a_machine_are_shared_by_the_ranks_on_it(config, monkeypatch):
    monkeypatch.setattr(
        Machine, "here", classmethod(lambda cls: cls(num_cores=8, has_cuda=False, cache_dir=Path("cache")))
    )
    assert by_hand(config, "--server.num_ranks=4", place=TWO_OF_FOUR).torch_threads == 4
    assert by_hand(config, "--server.num_ranks=4", "--server.torch_threads=3", place=TWO_OF_FOUR).torch_threads == 3


def test_each_start_has_a_lease_of_its_own(config):
    assert by_hand(config).lease_owner != by_hand(config).lease_owner


def test_as_many_ranks_as_the_config_says_must_have_been_started(config):
    with pytest.raises(
        ConfigError, match="num_ranks: 1 is what the config's parallel sizes give, and torchrun started 4"
    ):
        by_hand(config, place=TWO_OF_FOUR)


@pytest.mark.config_field("redis_url")
def test_the_redis_is_that_of_the_command_line_then_of_the_config_then_of_the_environment(config, monkeypatch):
    assert by_hand(config).redis_url is None
    monkeypatch.setenv("GRADSTREAM_REDIS_URL", "redis://environment")
    assert by_hand(config).redis_url == "redis://environment"
    in_config = "--server.redis_url=redis://config"
    assert by_hand(config, in_config).redis_url == "redis://config"
    assert by_hand(config, in_config, redis_url="redis://line").redis_url == "redis://line"


def test_what_keeps_rank_0_from_the_server_keeps_its_kind(config):
    settings, comm = by_hand(config), Comm.single()

    def refuse() -> Settings:
        raise ConfigError([Problem("", "another config")])

    def miss() -> Settings:
        raise Unavailable("no server")

    assert agree(comm, settings) == settings
    with pytest.raises(ConfigError, match=r"^another config$"):
        agree(comm, settings, join=refuse)
    with pytest.raises(Unavailable, match="no server"):
        agree(comm, settings, join=miss)
