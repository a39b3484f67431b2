"""The same work on engines and models that differ in one numeric setting, and which operations torch ran for it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradstream.engine.config import Memory, Numerics
from gradstream.engine.models.base import BaseModel
from gradstream.engine.models.build import Build, load_base
from gradstream.shared.wire import ForwardBackwardDone
from tests.support.engine_builders import DENSE, Driver, cross_entropy, logprobs_of, open_engine, random_data, randomize
from tests.support.full import MODEL, full_driver

CPU = torch.device("cpu")
KINDS = ["adapters", "full weights"]


class Ops(TorchDispatchMode):
    """Within the block, how often each operation ran, by its name without overload."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def num_products(self) -> int:
        return sum(self.counts[name] for name in ("mm", "addmm", "addmm_", "bmm"))


def driver_of(kind: str, path: Path = DENSE, *, memory: Memory | None = None, **numerics: object) -> Driver:
    """An engine with one model, an adapter with gradients everywhere or the full weights."""
    changes = {"numerics": Numerics(**numerics), "memory": memory or Memory()}  # type: ignore[arg-type]
    if kind == "full weights":
        return full_driver(path, **changes)  # type: ignore[arg-type]
    driver = Driver(open_engine(path, **changes))
    driver.create(MODEL)
    randomize(driver, MODEL)
    return driver


def pass_of(driver: Driver, lengths: tuple[int, ...] = (20, 9, 13)) -> tuple[np.ndarray, Tensor]:
    """(log-probabilities, gradient) of random datums."""
    outcome = driver.done(MODEL, cross_entropy(random_data(list(lengths))))
    assert isinstance(outcome, ForwardBackwardDone)
    return np.concatenate(logprobs_of(outcome)), driver.grad(MODEL)


def base_of(path: Path = DENSE, *, dtype: torch.dtype = torch.float32, **numerics: object) -> BaseModel:
    return load_base(path, device=CPU, dtype=dtype, build=Build(numerics=Numerics(**numerics)))  # type: ignore[arg-type]


@torch.no_grad()
def hidden_of(base: BaseModel, num_tokens: int = 24) -> Tensor:
    """Final hidden states of fixed tokens."""
    tokens = torch.randint(base.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(5))
    context = base.packed([num_tokens])
    return base.hidden(tokens, context.segments.positions, attention=context, adapters=None)
