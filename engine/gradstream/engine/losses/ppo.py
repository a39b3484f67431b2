"""Clipped policy gradient, summed over tokens.

    loss = -sum min(r A, clip(r, low, high) A)        r = exp(p - q)

p: log-probability of the target. low and high are bounds of r itself. A token with advantage 0 is switched off.

Inputs: target_tokens int64 [T]; logprobs q, float32 [T], of the policy that sampled; advantages A, float32 [T]; optionally
clip_low_threshold and clip_high_threshold, float32 [T], which stand in for the parameters token by token.
Parameters: clip_low_threshold 0.8, clip_high_threshold 1.2.
Source: Schulman et al. 2017, equation 7; the tinker documentation's ppo.
"""

from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import (
    CLIP_METRIC,
    POLICY_INPUTS,
    RATIO_METRICS,
    THRESHOLD_INPUTS,
    clip_fraction,
    difference,
    held_difference,
    ratio_metrics,
    smaller_gain,
    threshold_params,
    within_thresholds,
)
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    ratio_TC = difference(arguments).exp()
    return smaller_gain(arguments, ratio_TC, within_thresholds(arguments, ratio_TC))


def _measure(arguments: LossArguments) -> dict[str, float]:
    ratio_TC = held_difference(arguments).exp()
    return ratio_metrics(arguments) | clip_fraction(arguments, ratio_TC, within_thresholds(arguments, ratio_TC))


LOSSES.register("ppo")(
    Loss(
        card=LossCard(
            name="ppo",
            inputs=[*POLICY_INPUTS, *THRESHOLD_INPUTS],
            params=threshold_params(low=0.8, high=1.2),
            metrics=[*RATIO_METRICS, CLIP_METRIC],
        ),
        compute=_compute,
        measure=_measure,
    )
)
