"""What a model is made as: its adapter, its optimizer, and what its steps take when a request does not say."""

from typing import Literal

import msgspec

from gradstream.shared.catalog import EngineCard
from gradstream.shared.ids import ModelId, SessionId
from gradstream.shared.wire import CreateModel, LoraSpec, OptimizerSpec

Reduction = Literal["sum", "token_mean"]


class StepDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Hyper-parameters of optimizer_config, for steps whose request names none; None: the server's."""

    learning_rate: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that makes two creations the same. lora None: the base model's own weights."""

    base_model: str
    lora: LoraSpec | None
    optimizer: OptimizerSpec
    step_defaults: StepDefaults = StepDefaults()

    def payload(self, *, session: ModelId, save_as: str | None) -> CreateModel:
        """The job that makes the model; a xorl model is a session of its own. save_as: see `CreateModel`."""
        return CreateModel(
            session_id=SessionId(session),
            base_model=self.base_model,
            lora=self.lora,
            optimizer=self.optimizer,
            reduction="token_mean",
            save_as=save_as,
        )

    def record(self) -> dict[str, str]:
        """The fields of the model's record that tell how it was made."""
        fields = {
            "base_model": self.base_model,
            "spec": msgspec.json.encode(self).decode(),
            "step_defaults": msgspec.json.encode(self.step_defaults).decode(),
        }
        if self.lora is None:
            return {**fields, "rank": ""}
        flags = {name: str(int(getattr(self.lora, name))) for name in ("train_attn", "train_mlp", "train_unembed")}
        return {**fields, "rank": str(self.lora.rank), "seed": "", **flags}


def default_spec(card: EngineCard) -> ModelSpec:
    """The model that is there without being asked for."""
    modules = None if card.default_modules is None else sorted(set(card.default_modules))
    lora = LoraSpec(rank=card.default_rank, alpha=card.default_alpha, target_modules=modules)
    return ModelSpec(base_model=card.model_name, lora=lora if card.is_lora else None, optimizer=card.optimizer)
