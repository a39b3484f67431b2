"""The learning rate over a model's updates, as a multiple of the rate that each update brings."""

from dataclasses import dataclass
from enum import StrEnum
from math import cos, pi


class Decay(StrEnum):
    """How the multiplier falls from 1 after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Rises to 1 over warmup_steps updates, then falls to min_ratio at update total_steps, where it stays; CONSTANT never falls."""

    decay: Decay
    warmup_steps: int = 0
    total_steps: int | None = None
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.decay is not Decay.CONSTANT and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(f"total_steps {self.total_steps} must be above warmup_steps {self.warmup_steps}")

    def multiplier(self, number: int) -> float:
        """Of a model's update number, from 1: the first of a warm-up already moves, and the last of it is at the full rate."""
        if number <= self.warmup_steps:
            return number / self.warmup_steps
        if self.decay is Decay.CONSTANT or self.total_steps is None:
            return 1.0
        done = min(1.0, (number - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        left = 1.0 - done if self.decay is Decay.LINEAR else (1.0 + cos(pi * done)) / 2
        return self.min_ratio + (1.0 - self.min_ratio) * left
