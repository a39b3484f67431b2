"""The two that are compared in `bench.sampling`: the engine's sampler and transformers' generate, in one process on the same threads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gradstream.engine.adapters.adapter import FrozenAdapter, Owner, new_adapter
from gradstream.engine.models.base import BaseModel
from gradstream.engine.models.build import load_base
from gradstream.engine.sampler.choice import Choice, key_of
from gradstream.engine.sampler.request import SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine
from gradstream.engine.sampler.stops import StopRule
from gradstream.shared.ids import ModelId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec

RANK = 16
ALPHA = 32
PAD_TOKEN = 0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOISE_STD = 0.01
VOCAB_SIZE = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Every prompt continued num_samples times by exactly num_tokens tokens, at temperature 0 or 1 and from the whole vocabulary."""

    prompts: tuple[NDArray[np.int32], ...]
    num_tokens: int
    temperature: float
    has_adapter: bool
    num_samples: int = 1

    @property
    def total_tokens(self) -> int:
        return len(self.prompts) * self.num_samples * self.num_tokens


def make_prompts(lengths: Sequence[int], *, vocab_size: int, seed: int) -> tuple[NDArray[np.int32], ...]:
    """Random tokens, none of them the padding."""
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(1, vocab_size, length).astype(np.int32) for length in lengths)


def make_model(folder: Path) -> Path:
    """A random Qwen3 of 7.3 million parameters, 4.2 of them its embedding."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_TOKEN,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


class Ours:
    """The sampler of the engine, with one adapter of random weights on every projection."""

    def __init__(self, folder: Path) -> None:
        self.base: BaseModel = load_base(folder, device=torch.device("cpu"), dtype=torch.float32)
        self._adapter = _random_adapter(self.base)
        self._engine = SamplerEngine(base=self.base)

    def run(self, task: Task) -> int:
        """Number of new tokens."""
        engine = self._engine
        for index, prompt in enumerate(task.prompts):
            engine.add(self._request(task, index, prompt))
        tokens = 0
        while engine.has_work():
            for finished in engine.step():
                assert finished.error is None
                tokens += sum(len(sampled.tokens) for sampled in finished.sequences)
        return tokens

    def _request(self, task: Task, index: int, prompt: NDArray[np.int32]) -> SampleRequest:
        return SampleRequest(
            name=str(index),
            adapter=self._adapter if task.has_adapter else None,
            prompt=prompt,
            max_tokens=task.num_tokens,
            choice=Choice(temperature=task.temperature, top_k=-1, top_p=1.0),
            stop=StopRule(token_ids=frozenset()),
            keys=tuple(key_of(seed=index, job="", sample_index=sample) for sample in range(task.num_samples)),
        )


class Generate:
    """transformers.generate with its dynamic cache; prompts of different lengths are padded on the left. Adapters by peft, unmerged."""

    def __init__(self, folder: Path) -> None:
        self._plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), init_lora_weights=False)
        self._adapted = get_peft_model(model, config).eval()

    @torch.inference_mode()
    def run(self, task: Task) -> int:
        """Number of new tokens."""
        longest = max(map(len, task.prompts))
        ids = torch.full((len(task.prompts), longest), PAD_TOKEN)
        for row, prompt in enumerate(task.prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        out = (self._adapted if task.has_adapter else self._plain).generate(
            input_ids=ids,
            attention_mask=(ids != PAD_TOKEN).long(),
            max_new_tokens=task.num_tokens,
            eos_token_id=None,
            pad_token_id=PAD_TOKEN,
            do_sample=task.temperature > 0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=task.num_samples,
            use_cache=True,
        )
        return int((out.shape[1] - longest) * out.shape[0])


def _random_adapter(base: BaseModel) -> FrozenAdapter:
    spec = LoraSpec(rank=RANK, seed=1, train_unembed=False)
    owner = Owner(model_id=ModelId("bench:train:0"), tenant=TenantId("bench"), session_id=SessionId("bench"), spec=spec)
    adapter = new_adapter(owner, base_sites=base.sites, lora_alpha=ALPHA, engine_seed=0, device=torch.device("cpu"))
    adapter.weights.add_(torch.randn(adapter.weights.shape) * NOISE_STD)
    return adapter.frozen_copy()
