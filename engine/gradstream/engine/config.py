"""What the engine is told at start."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class DTypePolicy(StrEnum):
    """auto: float32 on CPU, bfloat16 on an accelerator."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; the same on every rank.

    model_path: a Hugging Face model directory. lora_alpha: every adapter is scaled by lora_alpha / rank. seed: mixed into the
    seed of adapters whose client gave none. row_budget_tokens: the default bound of one packed row; a plan brings its own.
    torch_threads: None leaves torch's choice. max_context_tokens: None takes the model's own limit. output_dir: where checkpoints go.
    storage_limit_bytes: what output_dir may hold with the save that is asked for, None for no limit.
    attention: a name in attention.registry.ATTENTION, or "auto".
    """

    model_path: Path
    model_name: str
    tokenizer_id: str
    output_dir: Path
    model_aliases: tuple[str, ...] = ()
    lora_alpha: float = 32.0
    max_lora_rank: int = 128
    seed: int = 0
    device: str = "cpu"
    dtype: DTypePolicy = DTypePolicy.AUTO
    attention: str = "auto"
    row_budget_tokens: int = 8192
    torch_threads: int | None = None
    max_context_tokens: int | None = None
    storage_limit_bytes: int | None = None
