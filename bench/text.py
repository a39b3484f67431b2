"""The text that training speed is measured on, and the models: random tokens in sequences of equal or of very different lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3Config, Qwen3ForCausalLM

SEED = 0
VOCAB_SIZE = 8192
# Of the lognormal distribution of lengths: the spread of chats' lengths, where padding to the longest of 16 costs a factor of 2 to 3.
_SIGMA = 0.9
_SHORTEST = 8

Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """steps: the sequences of each step, all of them int64 [T]."""

    name: str
    steps: Sequence[Sequence[Tokens]]

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for step in self.steps for tokens in step)

    @property
    def num_padded(self) -> int:
        """Tokens once each step's sequences are as long as its longest."""
        return sum(len(step) * max(len(tokens) for tokens in step) for step in self.steps)


def equal_text(*, num_steps: int, batch: int, length: int, vocab_size: int = VOCAB_SIZE) -> Text:
    """Sequences of one length."""
    rng = np.random.default_rng(SEED)
    steps = [[rng.integers(4, vocab_size, length) for _ in range(batch)] for _ in range(num_steps)]
    return Text(name="equal", steps=steps)


def variable_text(*, num_steps: int, batch: int, median: int, longest: int, vocab_size: int = VOCAB_SIZE) -> Text:
    """Sequences of lognormal lengths around a median."""
    rng = np.random.default_rng(SEED + 1)
    lengths = np.clip(rng.lognormal(np.log(median), _SIGMA, (num_steps, batch)), _SHORTEST, longest).astype(int)
    steps = [[rng.integers(4, vocab_size, length) for length in row] for row in lengths.tolist()]
    return Text(name="variable", steps=steps)


def make_model(folder: Path, *, hidden: int = 256, layers: int = 6, vocab_size: int = VOCAB_SIZE) -> Path:
    """Write a random Qwen3 (6.8 M parameters by default, its embedding tied) as a Hugging Face directory."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
