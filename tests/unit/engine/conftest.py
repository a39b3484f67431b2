"""Tiny models and engines for the engine's unit tests."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.support.engine_builders import DENSE, MOE
from transformers import LlamaConfig, LlamaForCausalLM

# How a sum is cut in parts depends on the number of threads, and tests compare bits of sums whose parts differ in size.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with untied head, three query heads on one key head, and sharded weights."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path, max_shard_size="200KB")
    return path


@pytest.fixture(scope="session")
def model_path(llama: Path) -> Callable[[str], Path]:
    """A model directory by family name."""
    return {"qwen3": DENSE, "qwen3_moe": MOE, "llama": llama}.__getitem__


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("a small file system needs the right to mount one")
    yield place
    subprocess.run(["umount", place], check=True)
