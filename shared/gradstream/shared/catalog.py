"""Cards: what the running engine offers, published by the worker and read by the API (torch-free)."""

import msgspec


class LossInput(msgspec.Struct, frozen=True, kw_only=True):
    """One array a loss reads, per datum. trailing: sizes after the token axis that are accepted besides none."""

    name: str
    dtype: str
    required: bool = True
    default: float | None = None


class LossParam(msgspec.Struct, frozen=True, kw_only=True):
    """One number (or text) of loss_fn_config, with inclusive bounds."""

    name: str
    default: float | str | None
    minimum: float | None = None
    maximum: float | None = None


class LossCard(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    inputs: list[LossInput]
    params: list[LossParam] = []


class EngineCard(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the engine behind this queue.

    model_name and model_aliases are what clients may ask for; tokenizer_id is what a client's AutoTokenizer can load.
    max_context_tokens bounds one datum and prompt + max_tokens. fingerprint names everything that changes result bits.
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

    def names(self) -> list[str]:
        """Every name a client may use for the base model, the main one first."""
        return [self.model_name, *self.model_aliases]
