"""Clipped policy gradient with an upper bound on the loss and corrections for a sampler that is not the trainer, summed.

    loss = sum w k l
    l    = max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A); with eps_clip_c and A < 0: min(l, -eps_clip_c A)
    r    = exp(clip(p - q, -20, 20))        g = exp(q - o)
    w    = clip(g, tis_clip_low, tis_clip_high) with use_tis, else 1
    k    = 1 where 1 / icepop_beta <= g <= icepop_beta, else 0; 1 everywhere without icepop_beta

p: log-probability of the target. A token with advantage 0 is switched off. Value and gradient both carry w and k: xorl's server
weights only its reported loss with w, and masks only its gradient with k.

Inputs: target_tokens int64 [T]; logprobs q, float32 [T], of the trainer before this update; advantages A, float32 [T];
rollout_logprobs o, float32 [T], of the sampler, required with use_tis or icepop_beta.
Parameters: eps_clip 0.2, eps_clip_high 0.2, eps_clip_c off (at least 1), use_tis 0.0 (1 turns it on), tis_clip_low 0.1,
tis_clip_high 2.0, icepop_beta off (at least 1).
Source: xorl's policy_loss. Schulman et al. 2017 (clip), Ye et al. 2020 (upper bound), Yao et al. 2025 (truncated importance
sampling, TIS), Ling team 2025 (IcePop).
"""

import torch
from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import (
    CLIP_METRIC,
    POLICY_INPUTS,
    RATIO_METRICS,
    clip_fraction,
    difference,
    held_difference,
    is_on,
    ratio_metrics,
    smaller_gain,
    when_on,
)
from gradstream.shared.catalog import LossCard, LossInput, LossParam

_ROLLOUT = "rollout_logprobs"
_MAX_LOG_RATIO = 20.0
_METRICS = [*RATIO_METRICS, CLIP_METRIC, "tis:mean", "tis:min", "tis:max", "icepop_frac:mean"]


def _compute(arguments: LossArguments) -> Tensor:
    advantages_TC = arguments.inputs["advantages"]
    ratio_TC = difference(arguments).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    loss_TC = smaller_gain(arguments, ratio_TC, _clipped(arguments, ratio_TC))
    if arguments.params["eps_clip_c"] is not None:
        capped_TC = torch.minimum(loss_TC, -arguments.number("eps_clip_c") * advantages_TC)
        loss_TC = torch.where(advantages_TC < 0, capped_TC, loss_TC)
    if arguments.params["use_tis"]:
        loss_TC = _tis_weights(arguments) * loss_TC
    if arguments.params["icepop_beta"] is not None:
        loss_TC = torch.where(_is_kept(arguments), loss_TC, torch.zeros_like(loss_TC))
    return loss_TC


def _clipped(arguments: LossArguments, ratio_TC: Tensor) -> Tensor:
    return ratio_TC.clamp(1 - arguments.number("eps_clip"), 1 + arguments.number("eps_clip_high"))


def _sampler_gap(arguments: LossArguments) -> Tensor:
    """g: the trainer's probability over the sampler's, [T, C]; 1 where the token is off."""
    return when_on(arguments, arguments.inputs["logprobs"] - arguments.inputs[_ROLLOUT]).exp()


def _tis_weights(arguments: LossArguments) -> Tensor:
    return _sampler_gap(arguments).clamp(arguments.number("tis_clip_low"), arguments.number("tis_clip_high"))


def _is_kept(arguments: LossArguments) -> Tensor:
    beta = arguments.number("icepop_beta")
    gap_TC = _sampler_gap(arguments)
    return (gap_TC >= 1 / beta) & (gap_TC <= beta)


def _measure(arguments: LossArguments) -> dict[str, float]:
    metrics = ratio_metrics(arguments)
    if not metrics:
        return {}
    ratio_TC = held_difference(arguments).exp()
    metrics |= clip_fraction(arguments, ratio_TC, _clipped(arguments, ratio_TC))
    is_on_TC = is_on(arguments)
    if arguments.params["use_tis"]:
        weights_N = _tis_weights(arguments)[is_on_TC].double()
        metrics |= {
            "tis:mean": float(weights_N.mean()),
            "tis:min": float(weights_N.min()),
            "tis:max": float(weights_N.max()),
        }
    if arguments.params["icepop_beta"] is not None:
        metrics["icepop_frac:mean"] = float((~_is_kept(arguments))[is_on_TC].double().mean())
    return metrics


LOSSES.register("policy_loss")(
    Loss(
        card=LossCard(
            name="policy_loss",
            inputs=[
                *POLICY_INPUTS,
                LossInput(name=_ROLLOUT, dtype="float32", required=False, required_by=["use_tis", "icepop_beta"]),
            ],
            params=[
                LossParam(name="eps_clip", default=0.2, minimum=0.0, maximum=1.0),
                LossParam(name="eps_clip_high", default=0.2, minimum=0.0),
                LossParam(name="eps_clip_c", default=None, minimum=1.0),
                LossParam(name="use_tis", default=0.0, choices=[0.0, 1.0]),
                LossParam(name="tis_clip_low", default=0.1, minimum=0.0, not_above="tis_clip_high"),
                LossParam(name="tis_clip_high", default=2.0, minimum=0.0),
                LossParam(name="icepop_beta", default=None, minimum=1.0),
            ],
            metrics=_METRICS,
        ),
        compute=_compute,
        measure=_measure,
    )
)
