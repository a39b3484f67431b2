"""Policy gradient with the ratio to the sampling policy, summed over tokens.

    loss = -sum r A        r = exp(p - q)

p: log-probability of the target. A token with advantage 0 is switched off.

Inputs: target_tokens int64 [T]; logprobs q, float32 [T], of the policy that sampled; advantages A, float32 [T].
Parameters: none.
Source: the tinker documentation's importance_sampling.
"""

from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import POLICY_INPUTS, RATIO_METRICS, difference, ratio_metrics
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    return -difference(arguments).exp() * arguments.inputs["advantages"]


LOSSES.register("importance_sampling")(
    Loss(
        card=LossCard(name="importance_sampling", inputs=POLICY_INPUTS, metrics=RATIO_METRICS),
        compute=_compute,
        measure=ratio_metrics,
    )
)
