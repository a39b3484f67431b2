"""Group-relative policy optimisation done right: clipped, without length normalisation, with an optional KL term, summed.

    loss = sum (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta kl)
    r    = exp(p - q), or with ratio_type sequence: exp(mean of p - q over the datum's tokens that are on)
    kl   = d (k1), d^2 / 2 (k2) or exp(-d) + d - 1 (k3)        d = p - o

p: log-probability of the target. The sequence ratio is differentiated too. A token with advantage 0 is switched off.

Inputs: target_tokens int64 [T]; logprobs q, float32 [T], of the policy that sampled; advantages A, float32 [T];
ref_logprobs o, float32 [T], of the reference policy, required with beta.
Parameters: clip_low 0.2, clip_high 0.28, beta 0.0, ratio_type token (or sequence), kl_type k3 (or k1, k2).
Source: Liu et al. 2025 (Dr. GRPO) as xorl's drgrpo has it; Schulman 2020 for the estimators of the KL divergence.
"""

import torch
from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import (
    CLIP_METRIC,
    POLICY_INPUTS,
    RATIO_METRICS,
    clip_fraction,
    datum_means,
    difference,
    held_difference,
    is_on,
    ratio_metrics,
    smaller_gain,
    when_on,
)
from gradstream.shared.catalog import LossCard, LossInput, LossParam

_REFERENCE = "ref_logprobs"
_KL = {
    "k1": lambda d_TC: d_TC,
    "k2": lambda d_TC: 0.5 * d_TC.square(),
    "k3": lambda d_TC: torch.expm1(-d_TC) + d_TC,
}


def _compute(arguments: LossArguments) -> Tensor:
    ratio_TC = _ratio(arguments, difference(arguments))
    loss_TC = smaller_gain(arguments, ratio_TC, _clipped(arguments, ratio_TC))
    if arguments.number("beta") > 0:
        drift_TC = when_on(arguments, arguments.logprobs_TC - arguments.inputs[_REFERENCE])
        loss_TC = loss_TC + arguments.number("beta") * _KL[str(arguments.params["kl_type"])](drift_TC)
    return loss_TC


def _ratio(arguments: LossArguments, log_ratio_TC: Tensor) -> Tensor:
    if arguments.params["ratio_type"] == "sequence":
        log_ratio_TC = datum_means(log_ratio_TC, is_on(arguments).to(log_ratio_TC.dtype), arguments.lengths)
    return log_ratio_TC.exp()


def _clipped(arguments: LossArguments, ratio_TC: Tensor) -> Tensor:
    return ratio_TC.clamp(1 - arguments.number("clip_low"), 1 + arguments.number("clip_high"))


def _measure(arguments: LossArguments) -> dict[str, float]:
    ratio_TC = _ratio(arguments, held_difference(arguments))
    return ratio_metrics(arguments) | clip_fraction(arguments, ratio_TC, _clipped(arguments, ratio_TC))


LOSSES.register("drgrpo")(
    Loss(
        card=LossCard(
            name="drgrpo",
            inputs=[
                *POLICY_INPUTS,
                LossInput(name=_REFERENCE, dtype="float32", required=False, required_by=["beta"]),
            ],
            params=[
                LossParam(name="clip_low", default=0.2, minimum=0.0, maximum=1.0),
                LossParam(name="clip_high", default=0.28, minimum=0.0),
                LossParam(name="beta", default=0.0, minimum=0.0),
                LossParam(name="ratio_type", default="token", choices=["token", "sequence"]),
                LossParam(name="kl_type", default="k3", choices=["k1", "k2", "k3"]),
            ],
            metrics=[*RATIO_METRICS, CLIP_METRIC],
        ),
        compute=_compute,
        measure=_measure,
    )
)
