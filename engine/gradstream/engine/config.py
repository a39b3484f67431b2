"""What the engine is told at start."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from gradstream.engine.optim.schedule import Schedule
from gradstream.shared.wire import OptimizerSpec


class DTypePolicy(StrEnum):
    """auto: float32 on CPU, bfloat16 on an accelerator."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How a model's functions are computed where there is a choice; each of them changes the last bits of results.

    router_fp32, lm_head_fp32: the products that give expert and vocabulary logits end in float32, whatever the compute dtype.
    rmsnorm_native, activation_native, rope_native: transformers' own operations; False is one fused kernel, which computes in float32
    and rounds once. attention_cast_bf16: queries and keys are rounded to bfloat16 after the rotary embedding.
    merge_qkv: the q, k and v projections are one matrix product.
    moe_implementation: eager is one product for each expert, native is torch's grouped product, None the best that runs.
    enable_compile: torch.compile of the decoder layers. ce_mode: how log-softmax and its gradient are computed.
    """

    router_fp32: bool = True
    lm_head_fp32: bool = True
    rmsnorm_native: bool = True
    activation_native: bool = True
    rope_native: bool = True
    attention_cast_bf16: bool = False
    merge_qkv: bool = True
    moe_implementation: Literal["eager", "native"] | None = None
    enable_compile: bool = False
    ce_mode: Literal["compiled", "eager"] = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is kept of a forward pass until its backward pass, and where. Results are the same, except that compiled basic_modules may
    differ from eager ones in the last bits.

    enable_gradient_checkpointing: the inputs of each decoder layer; the rest is computed again. enable_reentrant: by torch's older
    way. basic_modules: classes of further modules whose inputs are kept, and which enable_compile compiles where they are no part
    of a layer. enable_activation_offload: in host memory.
    """

    enable_gradient_checkpointing: bool = False
    enable_reentrant: bool = False
    enable_activation_offload: bool = False
    basic_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging:
    """When adapters' factors are frozen and fresh ones begin: after every interval of a model's updates, 0 for never.

    resets_optimizer: its state begins anew too. max_rank: of an adapter with all that was merged; a merge beyond it fails.
    """

    interval: int = 0
    resets_optimizer: bool = False
    max_rank: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; the same on every rank.

    model_path: a Hugging Face model directory. lora_alpha: every adapter is scaled by lora_alpha / rank. seed: mixed into the
    seed of adapters whose client gave none. row_budget_tokens: the default bound of one packed row; a plan brings its own.
    torch_threads: None leaves torch's choice. max_context_tokens: None takes the model's own limit. output_dir: where checkpoints go.
    storage_limit_bytes: what output_dir may hold with the save that is asked for, None for no limit.
    attention: a name in attention.registry.ATTENTION, or "auto". numerics, memory, config_path, init_device, load_weights_mode: see
    models.build.Build. tokenizer_path: where stop texts are looked up, None for model_path. is_lora: models are adapters; else there is
    one, the base model's own weights. master_dtype: of those weights beside a bfloat16 compute dtype; bf16 keeps no copy in float32.
    freeze_router: the weights that choose experts are no part of them. default_rank: what the API puts in where a client names none.
    optimizer: of models whose creation names none. max_row_tokens: the longest datum. schedule: of every model's learning rate, None to
    take the clients' as they are. ckpt_manager: the format of full-weight checkpoints. load_checkpoint_path: a checkpoint's directory
    or URI, which the full-weight model, or the adapter that need not be made, begins with; empty for none.
    lora_target_modules: what adapters change whose client names no modules, None for all that its switches allow. merging: of adapters.
    enable_self_test: a training pass on random tokens before anything is served. log_gradient_norms, log_router_stats: events at
    level DEBUG after every forward_backward; nothing is computed for them while that level is off.
    max_active_adapters: on the device; adapter_host_memory_bytes: of the others' states in host memory, the rest is in files.
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
    numerics: Numerics = field(default_factory=Numerics)
    memory: Memory = field(default_factory=Memory)
    config_path: Path | None = None
    tokenizer_path: Path | None = None
    init_device: Literal["cpu", "meta", "cuda"] = "meta"
    load_weights_mode: Literal["auto", "safetensors", "dcp"] = "auto"
    row_budget_tokens: int = 8192
    torch_threads: int | None = None
    max_context_tokens: int | None = None
    storage_limit_bytes: int | None = None
    is_lora: bool = True
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    freeze_router: bool = True
    default_rank: int = 32
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: Schedule | None = None
    ckpt_manager: Literal["dcp", "torch"] = "dcp"
    load_checkpoint_path: str = ""
    max_row_tokens: int = 8192
    lora_target_modules: tuple[str, ...] | None = None
    merging: Merging = field(default_factory=Merging)
    enable_self_test: bool = False
    log_gradient_norms: bool = False
    log_router_stats: bool = False
    max_active_adapters: int = 64
    adapter_host_memory_bytes: int = 4 << 30
