"""Policy gradient with clipped importance weights that are not differentiated, summed over tokens.

    loss = -sum sg(clip(r, low, high)) A p        r = exp(p - q)

p: log-probability of the target; sg: held constant. A token with advantage 0 is switched off.

Inputs: target_tokens int64 [T]; logprobs q, float32 [T], of the policy that sampled; advantages A, float32 [T]; optionally
clip_low_threshold and clip_high_threshold, float32 [T], which stand in for the parameters token by token.
Parameters: clip_low_threshold 0.0, clip_high_threshold 4.0.
Source: MiniMax-M1 2025, equation 4; the tinker documentation's cispo.
"""

from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import (
    CLIP_METRIC,
    POLICY_INPUTS,
    RATIO_METRICS,
    THRESHOLD_INPUTS,
    clip_fraction,
    held_difference,
    ratio_metrics,
    threshold_params,
    when_on,
    within_thresholds,
)
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    clipped_TC = within_thresholds(arguments, held_difference(arguments).exp())
    return -clipped_TC * arguments.inputs["advantages"] * when_on(arguments, arguments.logprobs_TC)


def _measure(arguments: LossArguments) -> dict[str, float]:
    ratio_TC = held_difference(arguments).exp()
    return ratio_metrics(arguments) | clip_fraction(arguments, ratio_TC, within_thresholds(arguments, ratio_TC))


LOSSES.register("cispo")(
    Loss(
        card=LossCard(
            name="cispo",
            inputs=[*POLICY_INPUTS, *THRESHOLD_INPUTS],
            params=threshold_params(low=0.0, high=4.0),
            metrics=[*RATIO_METRICS, CLIP_METRIC],
        ),
        compute=_compute,
        measure=_measure,
    )
)
