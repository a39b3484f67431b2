"""What this machine's matrix products reach, and how many floating-point operations a training step is by convention."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

# Square products of these sizes; the best of them is the limit.
_SIZES = (512, 1024, 2048)
_REPEATS = 3


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The most operations a second of square matrix products."""
    best = 0.0
    for size in _SIZES:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(left, right)
        for _ in range(_REPEATS):
            started = _now(device)
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (_now(device) - started))
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations that training a LoRA on a dense decoder takes: 4 N + 3 A a token, and nothing for padding or computing again.

    N: parameters in matrix products, the unembedding once, the embedding's look-up not at all; 2 N operations forward, 2 N for the
    gradient of the activations, none for that of frozen weights. A = 2 L H D S: causal attention forward of a sequence of S tokens,
    L layers, H heads of D. The adapter's own products are left out: less than 3 % at rank 8.
    """

    num_gemm: int
    attention: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Work":
        hidden, layers = config.hidden_size, config.num_hidden_layers
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * config.intermediate_size
        return cls(num_gemm=layers * layer + hidden * config.vocab_size, attention=2 * layers * queries)

    def lora_flops(self, lengths: Sequence[int]) -> int:
        """Of one pass forward and backward over sequences of these lengths."""
        return sum(4 * self.num_gemm * length + 3 * self.attention * length * length for length in lengths)
