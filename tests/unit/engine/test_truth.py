"""The engine's losses, gradients and steps against double precision and against peft."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.support.engine_builders import (
    DENSE,
    LORA_ALPHA,
    Data,
    Driver,
    cross_entropy,
    loss_of,
    open_engine,
    random_data,
    randomize,
)
from tests.support.oracle import Oracle, assert_true_cross_entropy, double_leaves, relative_error
from transformers import AutoModelForCausalLM

from gradstream.engine.adapters.layout import LoraPair
from gradstream.shared.ids import ModelId

FAMILIES = ["qwen3", "llama", "qwen3_moe"]
LENGTHS = [5, 33, 12, 12, 1, 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_every_gradient_equal_double_precision(family: str, model_path: Callable[[str], Path]) -> None:
    path = model_path(family)
    driver = Driver(open_engine(path), row_budget_tokens=50)
    driver.create("m", rank=4)
    randomize(driver, "m")
    adapter = driver.engine.state.models[ModelId("m")]
    data = random_data(LENGTHS)

    outcome = driver.done("m", cross_entropy(data))

    assert_true_cross_entropy(path, adapter, data, outcome)


@pytest.mark.parametrize(
    "switches",
    [
        {"train_attn": False, "train_unembed": False},
        {"train_mlp": False, "train_unembed": False},
        {"train_attn": False, "train_mlp": False},
    ],
    ids=["mlp only", "attn only", "unembed only"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_switch_trains_its_own_sites_with_true_gradients(
    family: str, switches: dict[str, bool], model_path: Callable[[str], Path]
) -> None:
    path = model_path(family)
    driver = Driver(open_engine(path))
    driver.create("m", rank=3, **switches)
    randomize(driver, "m")
    adapter = driver.engine.state.models[ModelId("m")]
    data = random_data([9, 16])

    driver.done("m", cross_entropy(data))

    leaves = double_leaves(adapter.named_views(adapter.weights))
    Oracle(path).cross_entropy(data, leaves, adapter.scale)[0].backward()
    for name, pair in adapter.named_views(adapter.grad).items():
        assert relative_error(pair.a, leaves[name].a.grad) < 2e-5, name
        assert relative_error(pair.b, leaves[name].b.grad) < 2e-5, name


class PeftTwin:
    """peft on transformers with torch.optim.AdamW, padded to one batch, started from an adapter's factors."""

    def __init__(self, path: Path, pairs: dict[str, LoraPair], rank: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        targets = sorted({name.rpartition(".")[2] for name in pairs})
        config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns that the head is tied; the adapter on it is wanted
            self.model = get_peft_model(model, config)
        self.factors = {
            name: LoraPair(
                self.model.get_parameter(f"base_model.model.{name}.lora_A.default.weight"),
                self.model.get_parameter(f"base_model.model.{name}.lora_B.default.weight"),
            )
            for name in pairs
        }
        with torch.no_grad():
            for name, pair in pairs.items():
                self.factors[name].a.copy_(pair.a)
                self.factors[name].b.copy_(pair.b)

    def loss(self, data: Data) -> torch.Tensor:
        width = max(map(len, data.tokens))
        ids, targets, weights, mask = (torch.zeros(len(data.tokens), width) for _ in range(4))
        for row, tokens in enumerate(data.tokens):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            targets[row, : len(tokens)] = torch.tensor(data.targets[row])
            weights[row, : len(tokens)] = torch.tensor(data.weights[row])
            mask[row, : len(tokens)] = 1
        logits = self.model(input_ids=ids.long(), attention_mask=mask.long()).logits
        logprobs = logits.log_softmax(-1).gather(-1, targets.long()[..., None])[..., 0]
        return -(weights * logprobs).sum()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradients_equal_peft_on_the_same_batch(family: str, model_path: Callable[[str], Path]) -> None:
    driver = Driver(open_engine(model_path(family)))
    driver.create("m", rank=8)
    randomize(driver, "m")
    adapter = driver.engine.state.models[ModelId("m")]
    twin = PeftTwin(model_path(family), adapter.named_views(adapter.weights), rank=8)
    data = random_data(LENGTHS)

    outcome = driver.done("m", cross_entropy(data))
    loss = twin.loss(data)
    loss.backward()

    assert loss_of(outcome) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-3)
    for name, pair in adapter.named_views(adapter.grad).items():
        assert relative_error(pair.a, twin.factors[name].a.grad) < 5e-5, name
        assert relative_error(pair.b, twin.factors[name].b.grad) < 5e-5, name


def test_many_steps_follow_peft_and_torch_adamw() -> None:
    driver = Driver(open_engine(DENSE))
    driver.create("m", rank=8)
    adapter = driver.engine.state.models[ModelId("m")]
    twin = PeftTwin(DENSE, adapter.named_views(adapter.weights), rank=8)
    data = random_data([24, 9, 17])
    data.weights = [np.ones_like(weights) for weights in data.weights]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in twin.model.parameters() if parameter.requires_grad],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-6,
        weight_decay=0.1,
    )
    ours, theirs = [], []
    for _ in range(15):
        ours.append(loss_of(driver.done("m", cross_entropy(data))))
        driver.step("m", learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, grad_clip_norm=0.7)
        loss = twin.loss(data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([group for group in twin.model.parameters() if group.requires_grad], 0.7)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert ours[-1] < 0.9 * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    for name, pair in adapter.named_views(adapter.weights).items():
        assert relative_error(pair.a, twin.factors[name].a.detach()) < 1e-4, name
        assert relative_error(pair.b, twin.factors[name].b.detach()) < 2e-3, name


def test_a_moe_model_learns_through_its_experts(model_path: Callable[[str], Path]) -> None:
    driver = Driver(open_engine(model_path("qwen3_moe")))
    driver.create("m", rank=4, train_attn=False, train_unembed=False)
    data = random_data([40])
    data.weights = [np.ones_like(weights) for weights in data.weights]
    losses = []
    for _ in range(20):
        losses.append(loss_of(driver.done("m", cross_entropy(data))))
        driver.step("m", learning_rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
