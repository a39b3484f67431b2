"""What get_info tells of a model, in either dialect."""

from pydantic import BaseModel, ConfigDict

from gradstream.api.records import Record
from gradstream.shared.catalog import EngineCard


class ModelData(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    arch: str
    model_name: str
    tokenizer_id: str


class ModelInfo(BaseModel):
    """lora_rank: null for full weights."""

    model_config = ConfigDict(protected_namespaces=())

    type: str = "get_info"
    model_id: str
    model_data: ModelData
    is_lora: bool
    lora_rank: int | None
    model_name: str


def base_name(record: Record, card: EngineCard) -> str:
    """The base model's name, as the client gave it when it made the model."""
    return record.get("base_model") or card.model_name


def model_info(record: Record, card: EngineCard, *, model_id: str, tokenizer_id: str) -> ModelInfo:
    """The record of a model for a client, by the names that it may see."""
    name = base_name(record, card)
    rank = record.get("rank")
    return ModelInfo(
        model_id=model_id,
        model_data=ModelData(arch=card.architecture, model_name=name, tokenizer_id=tokenizer_id),
        is_lora=card.is_lora,
        lora_rank=int(rank) if rank else None,
        model_name=name,
    )
