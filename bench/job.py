"""The job that every figure here is about: a random Qwen3 of 0.34 M parameters, 4 datums of 64 tokens, LoRA rank 8, Adam."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3Config, Qwen3ForCausalLM

RANK = 8
LORA_ALPHA = 32
NUM_DATUMS = 4
NUM_TOKENS = 64
VOCAB_SIZE = 2048
LEARNING_RATE = 1e-4
BETA2 = 0.95
EPS = 1e-12
SEED = 0
TOKENIZER_FROM = Path(__file__).parent.parent / "tests" / "models" / "tiny-qwen3-shakespeare"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """inputs and targets: int64 [num_datums, num_tokens]; each target follows its input."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


def make_model(folder: Path) -> Path:
    """Write the model as a Hugging Face directory with a tokenizer of the same vocabulary size."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER_FROM / name, folder / name)
    return folder


def make_data(num_datums: int = NUM_DATUMS, num_tokens: int = NUM_TOKENS) -> Data:
    """Random tokens, the same at every call."""
    tokens = np.random.default_rng(SEED).integers(4, VOCAB_SIZE, size=(num_datums, num_tokens + 1))
    return Data(inputs=tokens[:, :-1].copy(), targets=tokens[:, 1:].copy())
