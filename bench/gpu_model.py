"""Qwen3-shaped models with random weights made on the device, and an engine on them without any file of a model.

Imports nothing but torch, transformers, numpy and the engine, so that it runs where the server's packages are not installed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from gradstream.engine.config import DTypePolicy, EngineConfig
from gradstream.engine.engine import Engine
from gradstream.engine.models.build import Build, seam
from gradstream.engine.numerics import configure, resolve_dtype
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.state import EngineState
from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.ids import DEFAULT_MODEL, LOCAL_TENANT, ModelId, SessionId, future_id
from gradstream.shared.wire import (
    AdamParams,
    Batch,
    CreateModel,
    Failed,
    ForwardBackward,
    Job,
    LoraSpec,
    OptimStep,
    Payload,
    Plan,
)

NAME = "bench"
_MAX_POSITION = 32_768


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

    @property
    def matmul_params(self) -> int:
        """Parameters that every token is multiplied with: all but the embedding, and the unembedding once."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden

    def flops_per_token(self, *, context: int, is_lora: bool) -> float:
        """Of a forward and backward pass, by the usual count: 2 a parameter forward, 2 for the gradient of activations, 2 for that of
        weights where they train; attention over half of the context. Adapters themselves are left out.
        """
        attention = 2 * self.layers * self.heads * self.head_size * context
        return (4 if is_lora else 6) * self.matmul_params + 3 * attention


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=2, key_heads=1, head_size=32, vocab=512),
    "0.6B": Shape(hidden=1024, intermediate=3072, layers=28, heads=16, key_heads=8),
    "1.7B": Shape(hidden=2048, intermediate=6144, layers=28, heads=16, key_heads=8),
    "8B": Shape(hidden=4096, intermediate=12_288, layers=36, heads=32, key_heads=8, is_tied=False),
}


def qwen3(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """Random weights, made where they stay."""
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        max_position_embeddings=_MAX_POSITION,
        tie_word_embeddings=shape.is_tied,
        attn_implementation="sdpa",
        dtype=dtype,
    )
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


class Trainer:
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
            row_budget_tokens=16_384,
        )
        configure(config)
        place = torch.device(device)
        model = qwen3(shape, device=place, dtype=resolve_dtype(config.dtype, place)).eval().requires_grad_(False)
        base = seam(model, digest="random", build=Build.of(config))
        self.engine = Engine(EngineState(config=config, comm=Comm.single(), base=base))
        self._vocab, self._device = shape.vocab, place
        self._seq = 0
        lora = LoraSpec(rank=rank, seed=0, train_unembed=False) if is_lora else None
        self._owner = ModelId("s:train:0" if is_lora else DEFAULT_MODEL)
        self._run(CreateModel(session_id=SessionId("s"), base_model=NAME, lora=lora))

    def step(self, *, num_sequences: int, context: int) -> None:
        """forward_backward on random tokens, optim_step, and everything done on the device."""
        rng = np.random.default_rng(self._seq)
        tokens = rng.integers(0, self._vocab, (num_sequences, context + 1))
        self._run(
            ForwardBackward(
                tokens=Column.of([row[:-1].astype("int32") for row in tokens], dtype="int32"),
                inputs={"target_tokens": Column.of([row[1:] for row in tokens], dtype="int64")},
                loss_fn="cross_entropy",
                backward=True,
            )
        )
        self._run(OptimStep(adam=AdamParams(learning_rate=1e-4)))
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _run(self, payload: Payload) -> None:
        """Raises RuntimeError when the job fails."""
        job = Job(
            future_id=future_id(self._owner, self._seq),
            owner=self._owner,
            seq=self._seq,
            op=codec.op_of(payload),
            tenant=LOCAL_TENANT,
            payload=codec.encode(payload),
        )
        self._seq += 1
        plan = Plan(kind=job.op, future_ids=[job.future_id], row_budget_tokens=16_384)
        outcome = self.engine.execute(Batch(number=self._seq, epoch=1, plan=plan, jobs=[job]))[job.future_id]
        if isinstance(outcome, Failed):
            raise RuntimeError(outcome.message)  # noqa: TRY004 (a job that failed is no wrong type)
