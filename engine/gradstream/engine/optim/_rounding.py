"""Stochastic rounding to bf16, by random numbers that are a pure function of (key, place).

An update that is smaller than half the distance between two bf16 numbers (1/256 of the value) vanishes when it is rounded to the nearest
one: weights stop learning, and a second moment with beta2 0.999 stops following. Rounded up or down with probabilities in
proportion to the distances it is right on average, so small updates add up (Gupta et al. 2015, section 3).
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# A bf16 is the upper half of the float32 of the same value.
_LOW_BITS = 16
_LOW_MASK = (1 << _LOW_BITS) - 1
_WORD = 1 << 32


@dataclass(frozen=True, slots=True)
class Noise:
    """The random numbers of one update of one model; the same on every device, whatever the pieces that are drawn at a time."""

    key: bytes

    @classmethod
    def of(cls, *, seed: int, model_id: str, step: int) -> "Noise":
        """seed: the engine's. step: the number of the update."""
        return cls(hashlib.blake2b(f"{seed}:{step}:{model_id}".encode(), digest_size=16).digest())

    def bits(self, name: str, start: int, count: int, *, device: torch.device) -> Tensor:
        """int32 [count], evenly spread over 0 .. 65535: the numbers of the values start .. start + count of tensor `name`."""
        first_end = min(start + count, (start // _WORD + 1) * _WORD)
        parts = [self._word_bits(name, start, first_end - start, device=device)]
        if first_end < start + count:
            parts.append(self._word_bits(name, first_end, start + count - first_end, device=device))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _word_bits(self, name: str, start: int, count: int, *, device: torch.device) -> Tensor:
        """Of places that agree in all but the lowest 32 bits.

        The mixing is that of the 32-bit finalizer "lowbias32" (C. Wellons, hash-prospector), with a second key between its rounds,
        so that two keys do not give one sequence shifted.
        """
        digest = hashlib.blake2b(f"{start // _WORD}:{name}".encode(), key=self.key, digest_size=8).digest()
        first, second = (_int32(int.from_bytes(half, "little")) for half in (digest[:4], digest[4:]))
        # int32 arithmetic wraps; a right shift keeps the sign, which the mask removes.
        x = torch.arange(count, dtype=torch.int32, device=device).add_(_int32(start + first))
        x ^= (x >> 16) & 0xFFFF
        x *= _int32(0x7FEB352D)
        x += second
        x ^= (x >> 15) & 0x1FFFF
        x *= _int32(0x846CA68B)
        return (x >> 16) & _LOW_MASK


def _int32(value: int) -> int:
    """The int32 with the same low 32 bits."""
    low = value % _WORD
    return low - _WORD if low >= _WORD // 2 else low


def rounded(values: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> Tensor:
    """fp32 values in dtype: as they are for float32; for bfloat16 rounded to one of the two neighbours, to the nearest without noise.

    noise: int32 0 .. 65535, one for each value. The neighbour away from zero is taken with the probability that makes the mean right; a
    value that a bf16 can hold stays what it is, as do inf and nan. A finite value beyond the largest bf16 may become inf.
    """
    if dtype == torch.float32:
        return values
    assert dtype == torch.bfloat16
    if noise is None:
        return values.to(dtype)
    # The bits of a float are sign and magnitude: adding to them moves away from zero, whatever the sign.
    bits = values.view(torch.int32) + noise.view(values.shape)
    up = (bits & ~_LOW_MASK).view(torch.float32)
    return torch.where(values.isfinite(), up, values).to(dtype)
