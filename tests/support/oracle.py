"""Double-precision truth for losses and LoRA gradients, on unmodified transformers models.

The adapters are merged into the weights as differentiable functions of their factors, and each datum runs alone, unpadded.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.layout import LoraPair
from gradstream.shared.wire import Outcome
from tests.support.engine_builders import Data, logprobs_of, loss_of


class Oracle:
    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        self.model.config._experts_implementation = "eager"  # the grouped product has no float64
        self.model.requires_grad_(False)

    def logprobs(self, tokens: Tensor, targets: Tensor, pairs: dict[str, LoraPair], scale: float) -> Tensor:
        """log p of the targets [T], for factors in float64."""
        parameters = dict(self.model.model.named_parameters())
        changed = {}
        for name, pair in pairs.items():
            if name == "lm_head":
                continue
            path = name.removeprefix("model.")
            path = path if path in parameters else f"{path}.weight"
            changed[path] = parameters[path] + scale * pair.b @ pair.a
        output = functional_call(self.model.model, changed, kwargs={"input_ids": tokens[None], "use_cache": False})
        head = self.model.lm_head.weight
        if "lm_head" in pairs:
            head = head + scale * pairs["lm_head"].b @ pairs["lm_head"].a
        logits = nn.functional.linear(output.last_hidden_state[0], head)
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    def cross_entropy(self, data: Data, pairs: dict[str, LoraPair], scale: float) -> tuple[Tensor, list[Tensor]]:
        """(the summed loss, the log-probabilities of each datum), differentiable."""
        logprobs = [
            self.logprobs(torch.tensor(tokens).long(), torch.tensor(targets), pairs, scale)
            for tokens, targets in zip(data.tokens, data.targets, strict=True)
        ]
        losses = [
            -(torch.tensor(weights).double() * values).sum()
            for weights, values in zip(data.weights, logprobs, strict=True)
        ]
        return torch.stack(losses).sum(), logprobs


def double_leaves(pairs: dict[str, LoraPair]) -> dict[str, LoraPair]:
    """Copies in float64 that collect gradients."""
    return {
        name: LoraPair(pair.a.double().clone().requires_grad_(), pair.b.double().clone().requires_grad_())
        for name, pair in pairs.items()
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in the Frobenius norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def assert_true_cross_entropy(
    path: Path, adapter: Adapter, data: Data, outcome: Outcome, *, loss_atol: float = 1e-4, atol: float = 2e-5
) -> None:
    """The losses, log-probabilities and gradients of a pass over this data are those of double precision.

    What was merged into the adapter is in the truth as factors that collect no gradient. atol: of log-probabilities, and the relative
    error of gradients.
    """
    leaves = double_leaves(adapter.named_views(adapter.weights))
    pairs = leaves
    if (flat := adapter.frozen_factors()) is not None:
        frozen = adapter.layout.of_rank(adapter.factors.frozen_rank).named_views(flat.double())
        pairs = {
            name: LoraPair(torch.cat([frozen[name].a, pair.a], dim=-2), torch.cat([frozen[name].b, pair.b], dim=-1))
            for name, pair in leaves.items()
        }
    loss, logprobs = Oracle(path).cross_entropy(data, pairs, adapter.scale)
    loss.backward()
    assert loss_of(outcome) == pytest.approx(float(loss.detach()), rel=1e-5, abs=loss_atol)
    for got, want in zip(logprobs_of(outcome), logprobs, strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=atol, rtol=1e-5)
    for name, pair in adapter.named_views(adapter.grad).items():
        for side in ("a", "b"):
            assert relative_error(getattr(pair, side), getattr(leaves[name], side).grad) < atol, f"{name} {side}"
