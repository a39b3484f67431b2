"""What this machine's matrix products reach, and how many floating-point operations a training step is by convention.

Imports nothing but torch, transformers and the engine, so that `bench.gpu` runs where the server's packages are not installed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from gradstream.engine.products import mm

# Square products of these sizes; the best of all their repetitions is the limit.
_CPU_SIZES = (512, 1024, 2048)
_GPU_SIZES = (8192,)
_REPEATS = 8


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, *, clock: Callable[[], float]) -> float:
    """The most operations a second of square matrix products, by the faster of torch's own and the engine's.

    clock: in s, the one that the training beside it is timed by.
    """
    best = 0.0
    for size in _GPU_SIZES if device.type == "cuda" else _CPU_SIZES:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for product in (torch.mm, mm):
            product(left, right)
            for _ in range(_REPEATS):
                synchronize(device)
                started = clock()
                product(left, right)
                synchronize(device)
                best = max(best, 2 * size**3 / (clock() - started))
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """Operations that training a dense decoder takes: 4 N + 3 A a token for a LoRA, 6 N + 3 A in full.

    Nothing is counted for padding or for computing again. N: parameters in matrix products, the unembedding once, the embedding's
    look-up not at all; 2 N operations forward, 2 N for the gradient of the activations, 2 N for that of weights that train.
    A = 2 L H D S: causal attention forward of a sequence of S tokens,
    L layers, H heads of D. An adapter's own products are left out: less than 3 % at rank 8.
    """

    num_gemm: int
    # 2 L H D: for each token and token of its sequence.
    attention: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "TrainingCost":
        hidden, layers = config.hidden_size, config.num_hidden_layers
        head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * config.intermediate_size
        return cls(num_gemm=layers * layer + hidden * config.vocab_size, attention=2 * layers * queries)

    def flops(self, lengths: Sequence[int], *, is_lora: bool) -> int:
        """Of one pass forward and backward over sequences of these lengths."""
        per_token = (4 if is_lora else 6) * self.num_gemm
        return sum(per_token * length + 3 * self.attention * length * length for length in lengths)
