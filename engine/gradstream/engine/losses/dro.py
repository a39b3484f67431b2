"""Direct reward optimisation: advantages against a quadratic pull to the sampling policy, summed over tokens.

    loss = -sum (p A - 1/2 beta (p - q)^2)

p: log-probability of the target. A token with advantage 0 is switched off, the pull included: prompts come with advantage 0 and a
log-probability of 0 that is no policy's.

Inputs: target_tokens int64 [T]; logprobs q, float32 [T], of the policy that sampled; advantages A, float32 [T].
Parameters: beta 0.05, the strength of the pull. The hosted service's own default is not published; 0.05 is its documents' example.
Source: Richemond et al. 2024 in the form of the tinker documentation's dro.
"""

from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import POLICY_INPUTS, RATIO_METRICS, difference, ratio_metrics, when_on
from gradstream.shared.catalog import LossCard, LossParam


def _compute(arguments: LossArguments) -> Tensor:
    gain_TC = when_on(arguments, arguments.logprobs_TC) * arguments.inputs["advantages"]
    return 0.5 * arguments.number("beta") * difference(arguments).square() - gain_TC


LOSSES.register("dro")(
    Loss(
        card=LossCard(
            name="dro",
            inputs=POLICY_INPUTS,
            params=[LossParam(name="beta", default=0.05, minimum=0.0)],
            metrics=RATIO_METRICS,
        ),
        compute=_compute,
        measure=ratio_metrics,
    )
)
