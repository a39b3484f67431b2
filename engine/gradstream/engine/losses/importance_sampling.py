"""Policy gradient with the ratio to the sampling policy."""

from torch import Tensor

from gradstream.engine.losses._base import LOSSES, POLICY_INPUTS, Loss, LossArguments, policy_difference
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    """-r A with r = exp(p - q)."""
    return -policy_difference(arguments).exp() * arguments.inputs["advantages"]


LOSSES.register("importance_sampling")(
    Loss(card=LossCard(name="importance_sampling", inputs=POLICY_INPUTS), compute=_compute)
)
