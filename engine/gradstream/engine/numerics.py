"""Dtype and determinism rules, and the text that names everything on which result bits depend."""

import platform
import re
from dataclasses import fields
from pathlib import Path

import msgspec
import torch
import transformers
from torch.backends import cpu as cpu_backend

from gradstream.engine.attention.choose import resolved_attention
from gradstream.engine.attention.registry import ATTENTION
from gradstream.engine.checkpoint.start import Start
from gradstream.engine.config import DTypePolicy, EngineConfig
from gradstream.engine.models.base import BaseModel
from gradstream.engine.models.compiled import compiler_version
from gradstream.engine.models.switches import has_experts, is_grouped
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.products import library
from gradstream.shared.config.machine import fixed_cublas_workspace
from gradstream.shared.errors import Unsupported
from gradstream.shared.wire import OptimizerSpec

# Raised whenever a batch gets other bits than before for a reason that nothing else in the fingerprint names.
ARITHMETIC = 4


def resolve_dtype(policy: DTypePolicy, device: torch.device) -> torch.dtype:
    """The compute dtype of the base model. Adapters, their gradients and moments are fp32 in any case."""
    match policy:
        case DTypePolicy.FLOAT32:
            return torch.float32
        case DTypePolicy.BFLOAT16:
            return torch.bfloat16
        case DTypePolicy.AUTO:
            # On CPUs bf16 products are several times slower than fp32, and small LoRA updates vanish in rounding.
            return torch.float32 if device.type == "cpu" else torch.bfloat16


def master_dtype(config: EngineConfig, base: BaseModel) -> torch.dtype:
    """The dtype in which the weights of a full-weight model are kept; raises Unsupported where the compute dtype is finer."""
    if config.master_dtype == "fp32":
        return torch.promote_types(base.compute_dtype, torch.float32)
    if base.compute_dtype != torch.bfloat16:
        raise Unsupported(
            "master_dtype: bf16 needs a compute dtype of bfloat16; set enable_mixed_precision: true, or use fp32"
        )
    return torch.bfloat16


def configure(config: EngineConfig) -> None:
    """Set this process's torch switches: threads, true fp32 products, deterministic algorithms.

    On GPUs, where some operations have none, torch warns of these.
    """
    if config.torch_threads is not None:
        torch.set_num_threads(config.torch_threads)
    torch.set_float32_matmul_precision("highest")
    is_cpu = torch.device(config.device).type == "cpu"
    if not is_cpu:
        fixed_cublas_workspace()
    torch.use_deterministic_algorithms(True, warn_only=not is_cpu)
    # Filling every fresh tensor would only hide reads of unwritten memory, at a cost in each pass.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made by a module class


def device_names(config: EngineConfig, comm: Comm) -> str:
    """What all ranks compute on, one name if it is the same everywhere; on rank 0, else of this rank alone. Collective."""
    own = _device_name(torch.device(config.device))
    names = [name.decode() for name in comm.gather_bytes(own.encode()) or [own.encode()]]
    return own if len(set(names)) == 1 else ",".join(names)


def fingerprint(
    config: EngineConfig, base: BaseModel, comm: Comm, *, start: Start | None = None, devices: str | None = None
) -> str:
    """Two engines with the same fingerprint give the same bits for the same batches. devices: `device_names`, None for this rank's."""
    attention = resolved_attention(config.attention, device=base.device, dtype=base.compute_dtype)
    facts = {
        "arithmetic": str(ARITHMETIC),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": _device_name(base.device) if devices is None else devices,
        "dtype": str(base.compute_dtype).removeprefix("torch."),
        "attention": attention,
        "threads": str(torch.get_num_threads()),
        "ranks": str(comm.size),
        "model": base.facts.digest,
        "lora_alpha": str(config.lora_alpha),
        "seed": str(config.seed),
    }
    facts |= {part.name: _word(getattr(config.numerics, part.name)) for part in fields(config.numerics)}
    facts |= _tool_facts(config, base, attention)
    if not config.is_lora:
        facts |= {
            "weights": "full",
            "master": config.master_dtype,
            "router": "frozen" if config.freeze_router else "free",
        }
    elif config.lora_target_modules is not None:
        facts["modules"] = ",".join(config.lora_target_modules)
    if config.numerics.enable_compile and config.memory.basic_modules:
        facts["units"] = ",".join(config.memory.basic_modules)
    facts |= learning_facts(config)
    if start is not None:
        facts["start"] = start.digest
    return " ".join(f"{name}={value}" for name, value in facts.items())


def _tool_facts(config: EngineConfig, base: BaseModel, attention: str) -> dict[str, str]:
    """What a choice left to the engine came to, and the versions of what it brings; nothing where that is torch alone."""
    facts = {}
    if has_experts(base.causal_lm):
        facts["moe_implementation"] = "native" if is_grouped(base.causal_lm, config.numerics) else "eager"
    if (products := library(base.device, base.compute_dtype)) != "torch":
        facts["products"] = products
    if version := ATTENTION[attention].version():
        facts["attention_package"] = version
    numerics = config.numerics
    is_fused = not (numerics.rmsnorm_native and numerics.activation_native and numerics.rope_native)
    if base.device.type != "cpu":
        facts["cublas"] = fixed_cublas_workspace()
    elif numerics.enable_compile or numerics.ce_mode == "compiled" or is_fused:
        facts["compiler"] = compiler_version()
    return facts


def learning_facts(config: EngineConfig) -> dict[str, str]:
    """What models learn by unless they say otherwise, as JSON; nothing where it is the default."""
    facts = {}
    if config.optimizer != OptimizerSpec():
        facts["optimizer"] = msgspec.json.encode(config.optimizer).decode()
    if config.schedule is not None:
        facts["schedule"] = msgspec.json.encode(config.schedule).decode()
    if config.merging.interval:
        facts["merging"] = msgspec.json.encode(config.merging).decode()
    return facts


def _word(value: object) -> str:
    """A value of a setting as in YAML."""
    return "null" if value is None else str(value).lower()


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu-{cpu_backend.get_cpu_capability()}-{_cpu_model()}"
    return torch.cuda.get_device_name(device).replace(" ", "-")


def _cpu_model() -> str:
    """Vendor, family and model of the processor, by which libraries of matrix products choose their kernels; else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (\S+)", text, re.MULTILINE))
    return "-".join(found.values()) or platform.machine()
