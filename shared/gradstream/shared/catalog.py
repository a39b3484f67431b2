"""Cards: what the running engine offers, published by the worker and read by the API (torch-free)."""

import msgspec

from gradstream.shared.wire import OptimizerSpec


class LossInput(msgspec.Struct, frozen=True, kw_only=True):
    """One array a loss reads, per datum, shaped like target_tokens; bounds are inclusive.

    Where it is absent: fallback names the parameter that stands in for every value, default is the value itself, and without
    either the loss does without it. required_by: parameters that make it required when they are set (neither None nor 0).
    """

    name: str
    dtype: str
    required: bool = True
    default: float | None = None
    fallback: str | None = None
    required_by: list[str] = []
    minimum: float | None = None
    maximum: float | None = None


class LossParam(msgspec.Struct, frozen=True, kw_only=True):
    """One number (or text) of loss_fn_config, with inclusive bounds. default None: the parameter is off unless given.

    choices: the texts, or the numbers, that are taken; empty for any. not_above: a parameter that this one may not exceed.
    """

    name: str
    default: float | str | None
    minimum: float | None = None
    maximum: float | None = None
    choices: list[float | str] = []
    not_above: str | None = None


class LossCard(msgspec.Struct, frozen=True, kw_only=True):
    """max_candidates: how many targets one token may have, C of target_tokens [T, C]; 1 takes [T] alone.

    metrics: what is reported beside loss:sum, by name.
    """

    name: str
    inputs: list[LossInput]
    params: list[LossParam] = []
    max_candidates: int = 1
    metrics: list[str] = []


class EngineCard(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the engine behind this queue.

    model_name and model_aliases are what clients may ask for; tokenizer_id is what a client's AutoTokenizer can load.
    max_context_tokens bounds one datum and prompt + max_tokens. fingerprint names everything that changes result bits.
    is_lora: models are adapters; else there is one model, DEFAULT_MODEL, whose full weights are trained. default_rank,
    default_alpha, default_modules (None for all) and optimizer: of models whose client names none. max_row_tokens: longest packed row.
    """

    model_name: str
    model_aliases: list[str]
    tokenizer_id: str
    architecture: str
    vocab_size: int
    max_context_tokens: int
    max_lora_rank: int
    num_ranks: int
    epoch: int
    fingerprint: str
    losses: list[LossCard]
    # Losses that clients know and this engine does not have, with the sentence that says so.
    refused_losses: dict[str, str] = {}
    is_lora: bool = True
    default_rank: int = 32
    default_alpha: float = 16.0
    optimizer: OptimizerSpec = OptimizerSpec()
    max_row_tokens: int = 2048
    default_modules: list[str] | None = None

    def names(self) -> list[str]:
        """Every name a client may use for the base model, the main one first."""
        return [self.model_name, *self.model_aliases]
