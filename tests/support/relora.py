"""Engines whose adapters are merged, and the same training written out in torch."""

from pathlib import Path

import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.initial import initial_weights, merge_seed
from gradstream.engine.adapters.layout import LoraPair
from gradstream.engine.config import Merging
from gradstream.shared.ids import ModelId
from tests.support.engine_builders import DENSE, Data, Driver, cross_entropy, loss_of, open_engine, random_data
from tests.support.oracle import Oracle

ADAM = {"learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.05}
LENGTHS = [12, 7, 30]


def merging_driver(
    path: Path = DENSE, *, interval: int = 2, resets: bool = False, max_rank: int = 64, **changes: object
) -> Driver:
    merging = Merging(interval=interval, resets_optimizer=resets, max_rank=max_rank)
    return Driver(open_engine(path, merging=merging, **changes))


def adapter_of(driver: Driver, model: str = "m") -> Adapter:
    adapter = driver.engine.state.models[ModelId(model)]
    assert isinstance(adapter, Adapter)
    return adapter


def train(driver: Driver, numbers: range, model: str = "m") -> list[float]:
    """One pass and one update for each number; the losses."""
    losses = []
    for number in numbers:
        losses.append(loss_of(driver.done(model, cross_entropy(random_data(LENGTHS, seed=number)))))
        driver.step(model, **ADAM)
    return losses


class TorchReLora:
    """ReLoRA in float64 on an unmodified transformers model: merges change its weights themselves."""

    def __init__(self, path: Path, adapter: Adapter, *, interval: int, resets: bool) -> None:
        """adapter: a fresh one, whose first values and seed are taken."""
        self.oracle = Oracle(path)
        self._layout = adapter.layout
        self._seed = adapter.spec.seed or 0
        self._scale = adapter.scale
        self._interval, self._resets = interval, resets
        self.pairs = {
            name: LoraPair(pair.a.double().clone().requires_grad_(), pair.b.double().clone().requires_grad_())
            for name, pair in adapter.named_views(adapter.weights).items()
        }
        self._optimizer = self._new_optimizer()
        self.num_merges = self._step = 0

    def train(self, data: Data) -> float:
        """One update; the loss before it."""
        loss, _ = self.oracle.cross_entropy(data, self.pairs, self._scale)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._step += 1
        if self._step % self._interval == 0:
            self._merge()
        return float(loss.detach())

    @torch.no_grad()
    def _merge(self) -> None:
        self.num_merges += 1
        fresh = self._layout.named_views(initial_weights(self._layout, seed=merge_seed(self._seed, self.num_merges)))
        for name, pair in self.pairs.items():
            self._weight(name).add_(pair.b @ pair.a, alpha=self._scale)
            pair.a.copy_(fresh[name].a)
            pair.b.zero_()
        if self._resets:
            self._optimizer = self._new_optimizer()

    def _weight(self, name: str) -> Tensor:
        model = self.oracle.model
        if name == "lm_head" and model.lm_head.weight is model.model.embed_tokens.weight:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
        parameters = dict(model.named_parameters())
        return parameters[name] if name in parameters else parameters[f"{name}.weight"]

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [factor for pair in self.pairs.values() for factor in pair],
            lr=ADAM["learning_rate"],
            betas=(ADAM["beta1"], ADAM["beta2"]),
            eps=ADAM["eps"],
            weight_decay=ADAM["weight_decay"],
        )
