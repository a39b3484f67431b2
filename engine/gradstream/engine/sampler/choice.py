"""The next token of a row, from its logits and one random number of its own.

The random number is a pure function of (key, position): a keyed hash, not a generator with state. So a draw depends neither on the
other rows of the batch nor on what was drawn before, and the same job gives the same tokens when it is replayed.
"""

# Shape letters: B rows, V vocabulary.

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MANTISSA_BITS = 53


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a row chooses. temperature 0 takes the most likely token; top_k -1 (or 0) and top_p 1 keep the whole vocabulary."""

    temperature: float
    top_k: int
    top_p: float

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def key_of(*, seed: int | None, job: str, sample_index: int) -> bytes:
    """The 16-byte key of one sample's random numbers: of (seed, index) when there is a seed, else of (job, index)."""
    name = f"job:{job}" if seed is None else f"seed:{seed}"
    return hashlib.blake2b(f"{name}:{sample_index}".encode(), digest_size=16).digest()


def uniform(key: bytes, position: int) -> float:
    """A number in [0, 1), evenly spread over its 2**53 values."""
    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return float((int.from_bytes(digest, "little") >> (64 - _MANTISSA_BITS)) * 2.0**-_MANTISSA_BITS)


def scaled_logprobs(logits_BV: Tensor, choices: list[Choice]) -> Tensor:
    """float32 [B, V]: log-probabilities of each row's temperature-scaled distribution, before top-k and top-p.

    A greedy row is reported at temperature 1: its scaled distribution would be certain of one token and say nothing.
    """
    temperatures = [1.0 if choice.is_greedy else choice.temperature for choice in choices]
    logits_BV = logits_BV.float()
    if any(temperature != 1.0 for temperature in temperatures):
        logits_BV = logits_BV / torch.tensor(temperatures, dtype=torch.float32, device=logits_BV.device)[:, None]
    return torch.log_softmax(logits_BV, dim=-1)


def choose(logprobs_BV: Tensor, choices: list[Choice], uniforms: list[float]) -> Tensor:
    """int64 [B]: one token for each row of `scaled_logprobs`, by inverting its cumulative distribution at its uniform.

    Sums run in float64 in vocabulary order. top_k keeps the k most likely tokens, then top_p the fewest most likely of those that
    together have at least top_p of what is left; at equal probability the lower id goes first.
    """
    tokens_B = logprobs_BV.argmax(dim=-1)
    drawn = [row for row, choice in enumerate(choices) if not choice.is_greedy]
    if not drawn:
        return tokens_B
    probs_BV = logprobs_BV[drawn].double().exp()
    for index, row in enumerate(drawn):
        if choices[row].is_filtered:
            probs_BV[index] = _filtered(probs_BV[index], choices[row])
    cumulative_BV = probs_BV.cumsum(dim=-1)
    targets_B = torch.tensor([uniforms[row] for row in drawn], dtype=torch.float64, device=logprobs_BV.device)
    found_B = torch.searchsorted(cumulative_BV, (targets_B * cumulative_BV[:, -1])[:, None], right=True)[:, 0]
    tokens_B[drawn] = torch.minimum(found_B, _last_possible(probs_BV))
    return tokens_B


def _filtered(probs_V: Tensor, choice: Choice) -> Tensor:
    """probs_V with everything outside top_k and top_p set to zero; not renormalised."""
    sorted_V, order_V = probs_V.sort(descending=True, stable=True)
    if choice.top_k > 0:
        sorted_V[choice.top_k :] = 0.0
    if choice.top_p < 1.0:
        before_V = sorted_V.cumsum(dim=-1) - sorted_V
        # The first token has nothing before it, so that one always stays.
        outside_V = before_V >= choice.top_p * sorted_V.sum()
        outside_V[0] = False
        sorted_V[outside_V] = 0.0
    return torch.zeros_like(probs_V).scatter_(0, order_V, sorted_V)


def _last_possible(probs_BV: Tensor) -> Tensor:
    """int64 [B]: the highest id with a probability above zero; where rounding would carry a draw past the end."""
    positive_BV = (probs_BV > 0).flip(-1)
    return probs_BV.shape[-1] - 1 - positive_BV.to(torch.int8).argmax(dim=-1)
