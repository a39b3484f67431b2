"""The refusal of stable_reinforce: its formula is not published."""

from gradstream.engine.losses._base import REFUSED

REFUSED.register("stable_reinforce")(
    "loss_fn: 'stable_reinforce' is not offered here, since its formula is not published; use importance_sampling, ppo, cispo or "
    "gspo, which read the same target_tokens, logprobs and advantages"
)
