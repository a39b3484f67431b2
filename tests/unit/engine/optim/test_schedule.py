"""The multiplier of the learning rate against torch's schedulers."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from gradstream.engine.optim.schedule import Decay, Schedule


def torchs(warmup: int, after: LRScheduler | None, optimizer: torch.optim.Optimizer, num: int) -> list[float]:
    """The rates of the first updates by torch's schedulers."""
    first = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1)
    schedule = first if after is None else SequentialLR(optimizer, [first, after], milestones=[warmup - 1])
    rates = []
    for _ in range(num):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("decay", list(Decay))
def test_every_kind_follows_torchs_schedulers(optimizer: torch.optim.Optimizer, decay: Decay) -> None:
    warmup, total, ratio = 5, 25, 0.1
    after: LRScheduler | None = None
    if decay is Decay.LINEAR:
        after = LinearLR(optimizer, start_factor=1.0, end_factor=ratio, total_iters=total - warmup)
    elif decay is Decay.COSINE:
        after = CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=ratio)
    schedule = Schedule(decay=decay, warmup_steps=warmup, total_steps=total, min_ratio=ratio)
    want = torchs(warmup, after, optimizer, total)
    assert [schedule.multiplier(number) for number in range(1, total + 1)] == pytest.approx(want, abs=1e-9)


def test_the_first_update_moves_and_the_last_of_the_warm_up_is_at_the_full_rate() -> None:
    schedule = Schedule(decay=Decay.CONSTANT, warmup_steps=4)
    assert [schedule.multiplier(number) for number in (1, 2, 4, 5, 10**6)] == [0.25, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("decay", [Decay.LINEAR, Decay.COSINE])
def test_after_the_total_the_smallest_rate_stays(decay: Decay) -> None:
    schedule = Schedule(decay=decay, total_steps=10, min_ratio=0.25)
    assert [schedule.multiplier(number) for number in (10, 11, 1000)] == pytest.approx([0.25] * 3)
    assert schedule.multiplier(5) == pytest.approx(
        0.25 + 0.75 * (0.5 if decay is Decay.LINEAR else (1 + math.cos(math.pi / 2)) / 2)
    )


@pytest.mark.parametrize("total", [None, 3])
def test_a_decay_needs_an_end_after_the_warm_up(total: int | None) -> None:
    with pytest.raises(ValueError, match="must be above warmup_steps 3"):
        Schedule(decay=Decay.LINEAR, warmup_steps=3, total_steps=total)
