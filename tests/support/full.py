"""Engines that train full weights, and their double-precision twin: the transformers model itself."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gradstream.engine.engine import Engine
from gradstream.engine.models.full import FullModel
from gradstream.engine.parallel.comm import Comm
from gradstream.shared.ids import DEFAULT_MODEL, ModelId, SessionId
from gradstream.shared.wire import CreateModel, OptimizerSpec
from tests.support.engine_builders import DENSE, Data, Driver, open_engine

MODEL = DEFAULT_MODEL


def create_full(**changes: object) -> CreateModel:
    return CreateModel(session_id=SessionId("s"), base_model="tiny", lora=None, **changes)  # type: ignore[arg-type]


def full_driver(
    path: Path = DENSE,
    comm: Comm | None = None,
    *,
    row_budget_tokens: int = 8192,
    optimizer: OptimizerSpec | None = None,
    reduction: str = "sum",
    **changes: object,
) -> Driver:
    """An engine with its one model made."""
    driver = Driver(open_engine(path, comm, is_lora=False, **changes), row_budget_tokens=row_budget_tokens)
    driver.done(MODEL, create_full(optimizer=optimizer, reduction=reduction))
    return driver


def full_model(engine: Engine) -> FullModel:
    model = engine.state.models[ModelId(MODEL)]
    assert isinstance(model, FullModel)
    return model


def named(driver: Driver, flat: Tensor) -> dict[str, Tensor]:
    """A flat tensor's parts, by the parameters' names."""
    return full_model(driver.engine).layout.named_views(flat)


class Twin:
    """transformers' own model: every datum alone, unpadded."""

    def __init__(self, path: Path, *, dtype: torch.dtype = torch.float64, freeze_router: bool = True) -> None:
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
        self.model.config._experts_implementation = "eager"  # the grouped product has no float64
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not (freeze_router and name.endswith(".mlp.gate.weight")))

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def logprobs(self, data: Data) -> list[Tensor]:
        found = []
        for tokens, targets in zip(data.tokens, data.targets, strict=True):
            logits = self.model(input_ids=torch.tensor(tokens).long()[None], use_cache=False).logits[0]
            found.append(logits.log_softmax(-1).gather(-1, torch.tensor(targets).long()[:, None])[:, 0])
        return found

    def loss(self, data: Data) -> Tensor:
        """The weighted negative log-likelihood, summed."""
        parts = [
            -(torch.tensor(weights).to(values.dtype) * values).sum()
            for weights, values in zip(data.weights, self.logprobs(data), strict=True)
        ]
        return torch.stack(parts).sum()
