"""Which values of which fields exist today; the rest are refused at start in a sentence."""

from dataclasses import dataclass

from gradstream.shared.config.machine import COMPILER, FLASH_3, FLASH_4, Machine
from gradstream.shared.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Only:
    """values: what can be had, the best one first. why: the rest of the sentence "FIELD: VALUE ..." about any other value."""

    values: tuple[object, ...]
    why: str


# Of another transport: accepted, and named together in one notice.
ZMQ = ("worker_bind_host", "worker_bind_port", "engine_connect_host", "worker_bind_address")
# Of the embedded server: refused beside redis_url, which replaces it.
EMBEDDED = ("redis_data_dir", "redis_binary", "redis_memory_limit", "durability")

_FSDP = "belongs to FSDP2 sharding, which does not exist yet"
_DEEPEP = "belongs to DeepEP, which does not exist yet"
_PIPELINE = "belongs to pipeline parallelism, which does not exist yet"
_QLORA = "belongs to quantized training, which does not exist yet"
_COMPILED = "asks for a compiled kernel, and this machine has no compiler for it (a C++ compiler; on GPUs the package triton too)"

# Fields that have one value today, whatever the machine.
_EVERYWHERE: dict[str, Only] = {
    "ep_dispatch": Only(("alltoall",), _DEEPEP),
    "deepep_buffer_size_gb": Only((2.0,), _DEEPEP),
    "deepep_num_sms": Only((20,), _DEEPEP),
    "deepep_async_combine": Only((False,), _DEEPEP),
    "moe_implementation": Only((None, "eager", "native"), "is a mixture-of-experts kernel that does not exist yet"),
    "foundation": Only(({},), "has no meaning for the models that exist today"),
    "encoders": Only(({},), "asks for media other than text, which do not exist yet"),
    "data_parallel_mode": Only(("ddp", "none"), "asks for a sharded model, which does not exist yet"),
    "data_parallel_shard_size": Only((1,), _FSDP),
    "tensor_parallel_size": Only((1,), "asks for tensor parallelism, which does not exist yet"),
    "pipeline_parallel_size": Only((1,), "asks for pipeline parallelism, which does not exist yet"),
    "pipeline_parallel_schedule": Only(("1F1B",), _PIPELINE),
    "pp_variable_seq_lengths": Only((True,), _PIPELINE),
    "expert_parallel_size": Only((1,), "asks for expert parallelism, which does not exist yet"),
    "ulysses_parallel_size": Only((1,), "asks for context parallelism, which does not exist yet"),
    "ringattn_parallel_size": Only((1,), "asks for ring attention, which does not exist yet"),
    "cp_fsdp_mode": Only(("all",), _FSDP),
    "reshard_after_forward": Only((True,), _FSDP),
    "enable_full_shard": Only((True,), _FSDP),
    "enable_forward_prefetch": Only((False,), _FSDP),
    "moe_shared_lora": Only((False,), "asks for adapters shared by experts, which do not exist yet"),
    "moe_hybrid_shared_lora": Only((False,), "asks for adapters shared by experts, which do not exist yet"),
    "enable_qlora": Only((False,), _QLORA),
    "quant_format": Only(("nvfp4",), _QLORA),
    "quant_group_size": Only((16,), _QLORA),
    "qlora_exclude_modules": Only((None,), _QLORA),
}

_ON_CPU: dict[str, Only] = {
    "attn_implementation": Only(("sdpa", "eager", "native"), "cannot run on a CPU"),
    "init_device": Only(("meta", "cpu"), "needs a GPU"),
    "enable_activation_offload": Only((False,), "moves activations to CPU memory, and on a CPU they are there"),
}
# The packages that these attention backends come from.
_FLASH = {"flash_attention_3": FLASH_3, "flash_attention_4": FLASH_4}
_WITHOUT_COMPILER: dict[str, Only] = {
    "activation_native": Only((True,), _COMPILED),
    "rope_native": Only((True,), _COMPILED),
    "enable_compile": Only((False,), _COMPILED),
    "ce_mode": Only(("eager",), _COMPILED),
}

# Defaults that a CPU cannot carry. Activations of one token of a 135M model take about 3 MB; bfloat16 is several times slower there,
# compiling costs more than it gains, and time is scarcer than memory, so that nothing is computed twice.
CPU_DEFAULTS: dict[str, object] = {
    "sample_packing_sequence_len": 2048,
    "enable_mixed_precision": False,
    "enable_gradient_checkpointing": False,
    "rmsnorm_native": True,
    "activation_native": True,
    "rope_native": True,
    "ce_mode": "eager",
}


def supported_values(device: str, lacks: frozenset[str] = frozenset()) -> dict[str, Only]:
    """The fields that have fewer values than their type allows when the engine runs on device (cpu or cuda).

    lacks: what the machine does not have of machine.OPTIONAL.
    """
    found = _EVERYWHERE | (_ON_CPU if device == "cpu" else _on_cuda(lacks))
    is_compiling = COMPILER not in lacks and (device == "cpu" or "triton" not in lacks)
    return found if is_compiling else found | _WITHOUT_COMPILER


def _on_cuda(lacks: frozenset[str]) -> dict[str, Only]:
    found: dict[str, Only] = {}
    missing = {name for name, package in _FLASH.items() if package in lacks}
    if missing:
        values = ("native", "sdpa", "eager", *(name for name in _FLASH if name not in missing))
        found["attn_implementation"] = Only(values, "needs a package that is not installed")
    if "accelerate" in lacks:
        found["init_device"] = Only(("cpu",), "needs the package accelerate, by which transformers fills a GPU")
    return found


def device_of(settings: Settings, machine: Machine) -> str:
    """cpu or cuda: what `device` means on machine."""
    if settings.device == "auto":
        return "cuda" if machine.has_cuda else "cpu"
    return settings.device
