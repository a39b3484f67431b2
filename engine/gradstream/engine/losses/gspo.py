"""Clipped policy gradient with one ratio per sequence, in the token-level form, summed over tokens.

    loss = -sum min(r A, clip(r, low, high) A)
    r    = s exp(p - sg(p))        s = sg(exp(sum m (p - q) / sum m)) over the datum

p: log-probability of the target; sg: held constant. low and high are bounds of r itself. A token with advantage 0 gives no loss,
yet is part of s where its mask m is not 0. A datum whose mask is 0 everywhere has s = 1.

Inputs: target_tokens int64 [T]; logprobs q, float32 [T], of the policy that sampled; advantages A, float32 [T];
sequence_ratio_mask m, float32 [T], from 0 to 1, usually 1 on the sampled tokens; optionally clip_low_threshold and
clip_high_threshold, float32 [T], which stand in for the parameters token by token.
Parameters: clip_low_threshold 0.9997, clip_high_threshold 1.0004. The hosted service's defaults are not published; these are the
paper's, and are as narrow as they look because the ratio is a mean over the sequence.
Source: Zheng et al. 2025, equation 13 (GSPO-token); the tinker documentation's gspo.
"""

import torch
from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import (
    CLIP_METRIC,
    POLICY_INPUTS,
    RATIO_METRICS,
    THRESHOLD_INPUTS,
    clip_fraction,
    datum_means,
    ratio_metrics,
    smaller_gain,
    threshold_params,
    when_on,
    within_thresholds,
)
from gradstream.shared.catalog import LossCard, LossInput

_MASK = "sequence_ratio_mask"


def _sequence_ratio(arguments: LossArguments) -> Tensor:
    """s of each token's datum, [T, C]."""
    mask_TC = arguments.inputs[_MASK]
    log_ratio_TC = arguments.held_TC - arguments.inputs["logprobs"]
    log_ratio_TC = torch.where(mask_TC != 0, log_ratio_TC, torch.zeros_like(log_ratio_TC))
    return datum_means(log_ratio_TC, mask_TC, arguments.lengths).exp()


def _compute(arguments: LossArguments) -> Tensor:
    ratio_TC = _sequence_ratio(arguments) * when_on(arguments, arguments.logprobs_TC - arguments.held_TC).exp()
    return smaller_gain(arguments, ratio_TC, within_thresholds(arguments, ratio_TC))


def _measure(arguments: LossArguments) -> dict[str, float]:
    ratio_TC = _sequence_ratio(arguments)
    return ratio_metrics(arguments) | clip_fraction(arguments, ratio_TC, within_thresholds(arguments, ratio_TC))


LOSSES.register("gspo")(
    Loss(
        card=LossCard(
            name="gspo",
            inputs=[
                *POLICY_INPUTS,
                LossInput(name=_MASK, dtype="float32", minimum=0.0, maximum=1.0),
                *THRESHOLD_INPUTS,
            ],
            params=threshold_params(low=0.9997, high=1.0004),
            metrics=[*RATIO_METRICS, CLIP_METRIC],
        ),
        compute=_compute,
        measure=_measure,
    )
)
