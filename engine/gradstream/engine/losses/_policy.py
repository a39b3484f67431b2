"""What the policy-gradient losses share: inputs, thresholds, ratios and metrics.

Legend: T tokens of one job in one row, C candidates (targets) per token.
"""

import torch
from torch import Tensor

from gradstream.engine.losses._base import TARGETS, LossArguments
from gradstream.shared.catalog import LossInput, LossParam

TARGET_INPUT = LossInput(name=TARGETS, dtype="int64")
# q, the sampling policy's log-probabilities, and A, the advantages; a token with advantage 0 is switched off.
POLICY_INPUTS = [
    TARGET_INPUT,
    LossInput(name="logprobs", dtype="float32"),
    LossInput(name="advantages", dtype="float32"),
]
LOW, HIGH = "clip_low_threshold", "clip_high_threshold"
# Bounds of the ratio token by token; a datum without them has the call's.
THRESHOLD_INPUTS = [
    LossInput(name=name, dtype="float32", required=False, fallback=name, minimum=0.0) for name in (LOW, HIGH)
]
RATIO_METRICS = ["ratio:mean", "ratio:min", "ratio:max", "k3:mean", "entropy:mean"]
CLIP_METRIC = "clip_frac:mean"


def threshold_params(*, low: float, high: float) -> list[LossParam]:
    """Bounds of the ratio for a whole call, with their defaults."""
    return [
        LossParam(name=LOW, default=low, minimum=0.0, not_above=HIGH),
        LossParam(name=HIGH, default=high, minimum=0.0),
    ]


def is_on(arguments: LossArguments) -> Tensor:
    """bool [T, C]: tokens that take part."""
    return arguments.inputs["advantages"] != 0


def when_on(arguments: LossArguments, values_TC: Tensor) -> Tensor:
    """values_TC, and 0 where the token is off: before any exp, since the derivative of a discarded inf is nan."""
    return torch.where(is_on(arguments), values_TC, torch.zeros_like(values_TC))


def difference(arguments: LossArguments) -> Tensor:
    """p - q, [T, C], and 0 where the token is off."""
    return when_on(arguments, arguments.logprobs_TC - arguments.inputs["logprobs"])


def held_difference(arguments: LossArguments) -> Tensor:
    """sg(p) - q, [T, C], and 0 where the token is off."""
    return when_on(arguments, arguments.held_TC - arguments.inputs["logprobs"])


def within_thresholds(arguments: LossArguments, ratio_TC: Tensor) -> Tensor:
    """The ratio clipped to each token's thresholds."""
    return ratio_TC.clamp(arguments.inputs[LOW], arguments.inputs[HIGH])


def smaller_gain(arguments: LossArguments, ratio_TC: Tensor, clipped_TC: Tensor) -> Tensor:
    """-min(r A, clipped A), [T, C]."""
    advantages_TC = arguments.inputs["advantages"]
    return -torch.minimum(ratio_TC * advantages_TC, clipped_TC * advantages_TC)


def datum_means(values_TC: Tensor, weights_TC: Tensor, lengths: list[int]) -> Tensor:
    """Each datum's weighted mean of values_TC at each of its tokens, [T, C]; 0 in a datum whose weights are all 0.

    values_TC must be finite where the weight is 0 too.
    """
    means_TC = []
    for values_NC, weights_NC in zip(torch.split(values_TC, lengths), torch.split(weights_TC, lengths), strict=True):
        total_C = weights_NC.sum(dim=0)
        safe_C = torch.where(total_C != 0, total_C, torch.ones_like(total_C))
        means_TC.append(((values_NC * weights_NC).sum(dim=0) / safe_C).expand_as(values_NC))
    return torch.cat(means_TC)


def ratio_metrics(arguments: LossArguments) -> dict[str, float]:
    """RATIO_METRICS over the tokens that are on, in double precision; nothing when all are off.

    ratio: r = exp(p - q). k3: mean of r - 1 - log r, which estimates KL(q || p). entropy: mean of -q.
    """
    is_on_TC = is_on(arguments)
    if not bool(is_on_TC.any()):
        return {}
    log_ratio_N = held_difference(arguments)[is_on_TC].double()
    ratio_N = log_ratio_N.exp()
    return {
        "ratio:mean": float(ratio_N.mean()),
        "ratio:min": float(ratio_N.min()),
        "ratio:max": float(ratio_N.max()),
        "k3:mean": float((torch.expm1(log_ratio_N) - log_ratio_N).mean()),
        "entropy:mean": float(-arguments.inputs["logprobs"][is_on_TC].double().mean()),
    }


def clip_fraction(arguments: LossArguments, ratio_TC: Tensor, clipped_TC: Tensor) -> dict[str, float]:
    """CLIP_METRIC: the share of tokens that are on whose ratio the thresholds changed."""
    is_on_TC = is_on(arguments)
    if not bool(is_on_TC.any()):
        return {}
    return {CLIP_METRIC: float((ratio_TC != clipped_TC)[is_on_TC].double().mean())}
