"""Qwen3-shaped models with random weights made on the device, and an engine on them without any file of a model.

Imports nothing but torch, transformers, numpy and the engine, so that it runs where the server's packages are not installed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.limits import synchronize
from bench.ours import NAME, EngineJobs, cross_entropy
from gradstream.engine.config import DTypePolicy, EngineConfig
from gradstream.engine.engine import Engine
from gradstream.engine.models.build import Build, seam
from gradstream.engine.numerics import configure, resolve_dtype
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.state import EngineState
from gradstream.shared.wire import AdamParams, LoraSpec, OptimStep

_MAX_POSITION = 32_768
_ROW_TOKENS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3; those of the published models of these names, but for the random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int = 128
    vocab: int = 151_936
    is_tied: bool = True

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_size,
            max_position_embeddings=_MAX_POSITION,
            tie_word_embeddings=self.is_tied,
            attn_implementation="sdpa",
        )


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=2, key_heads=1, head_size=32, vocab=512),
    "0.6B": Shape(hidden=1024, intermediate=3072, layers=28, heads=16, key_heads=8),
    "1.7B": Shape(hidden=2048, intermediate=6144, layers=28, heads=16, key_heads=8),
    "8B": Shape(hidden=4096, intermediate=12_288, layers=36, heads=32, key_heads=8, is_tied=False),
}


def qwen3(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Random weights, made where they stay."""
    config = shape.config()
    config.dtype = dtype
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step is: sequences of context tokens each, and a LoRA's rank. steps: how many are measured."""

    num_sequences: int
    context: int
    rank: int
    steps: int


class RandomModelEngine:
    """The engine with one model of a shape, driven by the batches that the server's gang would execute."""

    def __init__(self, shape: Shape, *, device: str, is_lora: bool, rank: int, folder: Path) -> None:
        config = EngineConfig(
            model_path=folder,
            model_name=NAME,
            tokenizer_id=NAME,
            output_dir=folder,
            device=device,
            dtype=DTypePolicy.AUTO if is_lora or device != "cpu" else DTypePolicy.FLOAT32,
            is_lora=is_lora,
            row_budget_tokens=_ROW_TOKENS,
        )
        configure(config)
        place = torch.device(device)
        model = qwen3(shape, device=place, dtype=resolve_dtype(config.dtype, place)).eval().requires_grad_(False)
        base = seam(model, digest="random", build=Build.of(config))
        engine = Engine(EngineState(config=config, comm=Comm.single(), base=base))
        self._jobs = EngineJobs(engine, row_budget_tokens=_ROW_TOKENS)
        self._jobs.create(LoraSpec(rank=rank, seed=0, train_unembed=False) if is_lora else None)
        self._vocab, self._device = shape.vocab, place
        self._rng = np.random.default_rng(0)

    def step(self, *, num_sequences: int, context: int) -> None:
        """forward_backward on random tokens, optim_step, and everything done on the device."""
        tokens = self._rng.integers(0, self._vocab, (num_sequences, context + 1))
        self._jobs.run({0: cross_entropy(list(tokens))})
        self._jobs.run({0: OptimStep(adam=AdamParams(learning_rate=1e-4))})
        synchronize(self._device)
