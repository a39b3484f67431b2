"""Clipped importance weights that are not differentiated (MiniMax-M1 2025, equation 4), as a sum."""

import torch
from torch import Tensor

from gradstream.engine.losses._base import (
    LOSSES,
    POLICY_INPUTS,
    Loss,
    LossArguments,
    clip_params,
    policy_difference,
)
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    """-stop(clip(r, low, high)) A p with r = exp(p - q)."""
    advantages_TC = arguments.inputs["advantages"]
    ratio_TC = policy_difference(arguments).detach().exp()
    clipped_TC = ratio_TC.clamp(arguments.params["clip_low_threshold"], arguments.params["clip_high_threshold"])
    is_on_TC = advantages_TC != 0
    logprobs_TC = torch.where(is_on_TC, arguments.logprobs_TC, torch.zeros_like(arguments.logprobs_TC))
    return -clipped_TC * advantages_TC * logprobs_TC


LOSSES.register("cispo")(
    Loss(card=LossCard(name="cispo", inputs=POLICY_INPUTS, params=clip_params(low=0.0, high=4.0)), compute=_compute)
)
