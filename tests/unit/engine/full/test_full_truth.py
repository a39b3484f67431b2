"""Full weights: losses, every gradient and many steps against transformers with autograd and torch.optim."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.engine_builders import MOE, Data, cross_entropy, logprobs_of, loss_of, random_data
from tests.support.full import MODEL, Twin, full_driver, full_model, named
from tests.support.oracle import relative_error
from transformers import LlamaConfig, LlamaForCausalLM

LENGTHS = [5, 33, 12, 12, 1, 20]
FAMILIES = ["qwen3", "llama", "tied llama", "qwen3_moe"]


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied head and biases at its projections."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("tied_llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def path_of(model_path: Callable[[str], Path], tied_llama: Path) -> Callable[[str], Path]:
    return lambda family: tied_llama if family == "tied llama" else model_path(family)


def with_ones(data: Data) -> Data:
    data.weights = [np.ones_like(weights) for weights in data.weights]
    return data


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_every_gradient_equal_double_precision(family: str, path_of: Callable[[str], Path]) -> None:
    driver = full_driver(path_of(family), row_budget_tokens=50)
    data = random_data(LENGTHS)

    outcome = driver.done(MODEL, cross_entropy(data))

    twin = Twin(path_of(family))
    loss = twin.loss(data)
    loss.backward()
    assert loss_of(outcome) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-4)
    for got, want in zip(logprobs_of(outcome), twin.logprobs(data), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=2e-5, rtol=1e-5)
    grads = named(driver, driver.grad(MODEL))
    assert grads.keys() == twin.trained().keys()
    for name, parameter in twin.trained().items():
        assert relative_error(grads[name], parameter.grad) < 2e-5, name


@pytest.mark.config_field("freeze_router")
def test_routers_train_when_they_are_not_frozen() -> None:
    driver = full_driver(MOE, freeze_router=False)
    data = random_data(LENGTHS)

    driver.done(MODEL, cross_entropy(data))

    twin = Twin(MOE, freeze_router=False)
    twin.loss(data).backward()
    grads = named(driver, driver.grad(MODEL))
    routers = [name for name in grads if name.endswith(".mlp.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        assert relative_error(grads[name], twin.trained()[name].grad) < 2e-5, name


@pytest.mark.config_field("freeze_router")
def test_a_frozen_router_stays_as_it_is_and_is_no_part_of_the_model() -> None:
    driver = full_driver(MOE)
    router = driver.engine.state.base.causal_lm.get_parameter("model.layers.0.mlp.gate.weight")
    before = router.detach().clone()
    driver.done(MODEL, cross_entropy(random_data([20])))
    driver.step(MODEL, learning_rate=1e-2, weight_decay=0.1)
    assert torch.equal(router, before)
    assert not any(name.endswith("gate.weight") for name in named(driver, driver.grad(MODEL)))
    assert (
        full_model(driver.engine).layout.digest
        != full_model(full_driver(MOE, freeze_router=False).engine).layout.digest
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_many_steps_follow_torch_adamw_on_transformers(family: str, path_of: Callable[[str], Path]) -> None:
    driver = full_driver(path_of(family))
    twin = Twin(path_of(family), dtype=torch.float32)
    data = with_ones(random_data([24, 9, 17]))
    parameters = list(twin.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    ours, theirs = [], []
    for _ in range(10):
        ours.append(loss_of(driver.done(MODEL, cross_entropy(data))))
        driver.step(MODEL, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, grad_clip_norm=0.7)
        loss = twin.loss(data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.7)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    assert ours[-1] < 0.9 * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)
    weights = named(driver, driver.weights(MODEL))
    for name, parameter in twin.trained().items():
        assert relative_error(weights[name], parameter.detach()) < 1e-3, name


def test_a_layers_q_k_and_v_lie_side_by_side(path_of: Callable[[str], Path]) -> None:
    tensors = full_model(full_driver(path_of("tied llama")).engine).layout.tensors
    at = {tensor.name: tensor for tensor in tensors}
    for kind in ("weight", "bias"):
        q, k, v = (at[f"model.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv")
        assert (q.stop, k.stop) == (k.start, v.start)


def test_what_muon_turns_is_every_matrix_but_embedding_head_and_router(path_of: Callable[[str], Path]) -> None:
    tensors = full_model(full_driver(MOE, freeze_router=False).engine).layout.tensors
    others = {tensor.name for tensor in tensors if not tensor.is_matrix and len(tensor.shape) > 1}
    assert others == {"model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1))}
    untied = full_model(full_driver(path_of("llama")).engine).layout.tensors
    others = {tensor.name for tensor in untied if not tensor.is_matrix and len(tensor.shape) > 1}
    assert others == {"model.embed_tokens.weight", "lm_head.weight"}
