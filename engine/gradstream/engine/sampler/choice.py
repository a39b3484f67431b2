"""The next token of a row, from its logits and one random number of its own.

The random number is a pure function of (key, position): a keyed hash, not a generator with state. So a draw depends neither on the
other rows of the batch nor on what was drawn before, and the same job gives the same tokens when it is replayed.
"""

# Shape letters: B rows, V vocabulary, W tokens looked at, C blocks of W tokens, k draws.

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MANTISSA_BITS = 53
# Tokens whose probabilities are added up before any of them is looked at.
_BLOCK = 128
# How many of the likeliest tokens are looked at first; nearly all top-k and top-p sets are smaller, and sorting all is slow.
_FIRST_WIDTH = 64


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


def scaled_logits(logits_BV: Tensor, choices: list[Choice]) -> Tensor:
    """float32 [B, V]: logits of each row's temperature-scaled distribution, before top-k and top-p; may be the logits themselves.

    A greedy row stays at temperature 1: its scaled distribution would be certain of one token and say nothing.
    """
    temperatures = [1.0 if choice.is_greedy else choice.temperature for choice in choices]
    logits_BV = logits_BV.float()
    if any(temperature != 1.0 for temperature in temperatures):
        logits_BV = logits_BV / torch.tensor(temperatures, dtype=torch.float32, device=logits_BV.device)[:, None]
    return logits_BV


def scaled_logprobs(logits_BV: Tensor, choices: list[Choice]) -> Tensor:
    """float32 [B, V]: log-probabilities of each row's temperature-scaled distribution, before top-k and top-p."""
    return torch.log_softmax(scaled_logits(logits_BV, choices), dim=-1)


def choose(probs_BV: Tensor, choices: list[Choice], uniforms: list[float]) -> Tensor:
    """int64 [B]: one token for each row of float32 probabilities, by inverting its cumulative distribution at its uniform.

    top_k keeps the k most likely tokens, then top_p the fewest most likely of those that together have at least top_p of what is left;
    at equal probability the lower id goes first.
    """
    drawn = [row for row, choice in enumerate(choices) if not choice.is_greedy]
    if not drawn:
        return probs_BV.argmax(dim=-1)
    uniforms_B1 = torch.tensor([[uniforms[row]] for row in drawn], dtype=torch.float64, device=probs_BV.device)
    if len(drawn) == len(choices) and not any(choice.is_filtered for choice in choices):
        return _inverted(probs_BV, uniforms_B1)[:, 0]
    tokens_B = probs_BV.argmax(dim=-1)
    wide_BV = probs_BV[drawn].double()
    filtered = [index for index, row in enumerate(drawn) if choices[row].is_filtered]
    if filtered:
        wide_BV[filtered] = _filtered(wide_BV[filtered], [choices[drawn[index]] for index in filtered])
    tokens_B[drawn] = _inverted(wide_BV, uniforms_B1)[:, 0]
    return tokens_B


def draw(logprobs_BV: Tensor, choice: Choice, uniforms_Bk: Tensor) -> Tensor:
    """int64 [B, k]: k tokens for each row of `scaled_logprobs`, with replacement, from the whole vocabulary."""
    if choice.is_greedy:
        return logprobs_BV.argmax(dim=-1, keepdim=True).expand(uniforms_Bk.shape)
    return _inverted(logprobs_BV.exp(), uniforms_Bk)


def _inverted(probs_BV: Tensor, uniforms_Bk: Tensor) -> Tensor:
    """int64 [B, k]: where each float64 uniform of a row falls in the row's cumulative distribution, in vocabulary order.

    Sums of whole blocks first, then the tokens of one block, in float64: a running sum over all of a vocabulary takes longer than the
    rest of a small model's step.
    """
    num_rows, num_tokens = probs_BV.shape
    num_blocks = -(-num_tokens // _BLOCK)
    if num_tokens % _BLOCK:
        probs_BV = torch.nn.functional.pad(probs_BV, (0, num_blocks * _BLOCK - num_tokens))
    probs_BCW = probs_BV.view(num_rows, num_blocks, _BLOCK)
    masses_BC = probs_BCW.sum(dim=-1, dtype=torch.float64)
    ends_BC = masses_BC.cumsum(dim=-1)
    targets_Bk = uniforms_Bk * ends_BC[:, -1:]
    blocks_Bk = _first_above(ends_BC, targets_Bk, masses_BC)
    rows_B1 = torch.arange(num_rows, device=probs_BV.device)[:, None]
    inside_BkW = probs_BCW[rows_B1, blocks_Bk].double()
    before_Bk = ends_BC.gather(1, blocks_Bk) - masses_BC.gather(1, blocks_Bk)
    rest_Bk1 = (targets_Bk - before_Bk)[..., None]
    return blocks_Bk * _BLOCK + _first_above(inside_BkW.cumsum(dim=-1), rest_Bk1, inside_BkW)[..., 0]


def _first_above(ends: Tensor, targets: Tensor, masses: Tensor) -> Tensor:
    """int64, like targets: the first of the running sums in the last dimension that is above a target; the last that has a mass at most."""
    found = torch.searchsorted(ends, targets, right=True)
    last = masses.shape[-1] - 1 - (masses > 0).flip(-1).to(torch.int8).argmax(dim=-1, keepdim=True)
    return torch.minimum(found, last)


def _filtered(probs_BV: Tensor, choices: list[Choice]) -> Tensor:
    """probs_BV with everything outside each row's top_k and top_p set to zero; not renormalised."""
    device = probs_BV.device
    num_tokens = probs_BV.shape[1]
    ks = [min(choice.top_k, num_tokens) if choice.top_k > 0 else num_tokens for choice in choices]
    ks_B1 = torch.tensor(ks, device=device)[:, None]
    ps = [choice.top_p if choice.top_p < 1.0 else torch.inf for choice in choices]
    ps_B1 = torch.tensor(ps, dtype=probs_BV.dtype, device=device)[:, None]
    # All of top_k must be seen, and one more that is outside.
    width = min(max(_FIRST_WIDTH, *(k + 1 for k in ks if k < num_tokens), 0), num_tokens)
    while True:
        top_BW = probs_BV.topk(width, dim=-1).values
        allowed_BW = torch.arange(width, device=device) < ks_B1
        mass_B1 = torch.where(
            ks_B1 < num_tokens, (top_BW * allowed_BW).sum(-1, keepdim=True), probs_BV.sum(-1, keepdim=True)
        )
        before_BW = top_BW.cumsum(dim=-1) - top_BW
        inside_BW = allowed_BW & (before_BW < ps_B1 * mass_B1)
        # The first token has nothing before it, so that one always stays.
        inside_BW[:, 0] = True
        if width == num_tokens or bool((~inside_BW[:, -1]).all()):
            break
        width = min(width * 8, num_tokens)
    return probs_BV * _likeliest(probs_BV, top_BW, counts_B=inside_BW.sum(dim=-1))


def _likeliest(probs_BV: Tensor, top_BW: Tensor, *, counts_B: Tensor) -> Tensor:
    """bool [B, V]: the counts_B likeliest tokens of each row, the lower ids among equals. top_BW: the row's highest, sorted."""
    last_B1 = top_BW.gather(-1, counts_B[:, None] - 1)
    is_counted_BW = torch.arange(top_BW.shape[1], device=top_BW.device) < counts_B[:, None]
    num_equal_B1 = ((top_BW == last_B1) & is_counted_BW).sum(dim=-1, keepdim=True)
    equal_BV = probs_BV == last_B1
    return (probs_BV > last_B1) | (equal_BV & (equal_BV.cumsum(dim=-1) <= num_equal_B1))
