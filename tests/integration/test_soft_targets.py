"""Distillation targets through the unmodified SDK and a real server equal double precision on the same model."""

from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tests.support.engine_builders import DENSE, VOCAB
from tests.support.oracle import Oracle
from tinker import types

from examples.local_server import local_server

TINY = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"
pytestmark = [pytest.mark.e2e]


def datum(tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens.tolist()),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )


def test_losses_log_probabilities_and_gradient_norms_of_soft_targets_are_true(tmp_path, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    generator = torch.Generator().manual_seed(0)
    data = []
    for length in (9, 4):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator)
        targets = torch.randint(0, VOCAB, (length, 3), generator=generator)
        weights = torch.randn(length, 3, generator=generator) * (torch.arange(length) >= length - 2)[:, None]
        data.append((tokens, targets, weights))
    soft = [datum(*one) for one in data]
    assert soft[0].loss_fn_inputs["weights"].sparse_crow_indices is not None
    hard = [[datum(tokens, targets[:, k], weights[:, k]) for tokens, targets, weights in data] for k in range(3)]

    with local_server(TINY, output_dir=tmp_path) as server:
        service = tinker.ServiceClient(base_url=server.url)
        client = service.create_lora_training_client(base_model="gradstream/tiny-qwen3-shakespeare", rank=4, seed=3)
        still = types.AdamParams(learning_rate=0.0)
        got = client.forward_backward(soft, "cross_entropy").result()
        soft_norm = client.optim_step(still).result().metrics["grad_norm"]
        for part in hard:
            client.forward_backward(part, "cross_entropy").result()
        hard_norm = client.optim_step(still).result().metrics["grad_norm"]
        custom = client.forward_backward_custom(
            soft,
            lambda datums, logprobs: (
                -sum((d.loss_fn_inputs["weights"].to_torch() * p).sum() for d, p in zip(datums, logprobs, strict=True)),
                {"mine": 1.0},
            ),
        ).result()
        custom_norm = client.optim_step(still).result().metrics["grad_norm"]
        service.holder.close()

    # A fresh adapter changes nothing, so the bare model is the truth.
    oracle, want = Oracle(DENSE), 0.0
    for (tokens, targets, weights), output in zip(data, got.loss_fn_outputs, strict=True):
        true = torch.stack([oracle.logprobs(tokens, targets[:, k], {}, 1.0) for k in range(3)], dim=1)
        assert output["logprobs"].shape == list(targets.shape)
        np.testing.assert_allclose(output["logprobs"].to_numpy(), true.numpy(), atol=2e-5, rtol=1e-5)
        want -= float((weights.double() * true).sum())
    assert got.metrics["loss:sum"] == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert soft_norm == pytest.approx(hard_norm, rel=1e-4)
    assert custom.metrics["loss:sum"] == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert custom.metrics["mine"] == 1.0
    assert custom_norm == pytest.approx(soft_norm, rel=1e-4)
