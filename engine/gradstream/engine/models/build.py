"""A Hugging Face model directory becomes a BaseModel."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from gradstream.engine.adapters.layout import Site
from gradstream.engine.adapters.modules import AdaptedExperts, AdaptedLinear, PassSlot
from gradstream.engine.attention.choose import AUTO, choose_attention
from gradstream.engine.attention.registry import PackedAttention
from gradstream.engine.attention.seam import implementation
from gradstream.engine.config import EngineConfig, Memory, Numerics
from gradstream.engine.models.base import BaseModel, ModelFacts, Seams
from gradstream.engine.models.compiled import compile_layers, require_compiler
from gradstream.engine.models.dcp_files import load_dcp_model
from gradstream.engine.models.digest import model_digest
from gradstream.engine.models.expert_loads import ExpertLoads
from gradstream.engine.models.flat import FlatParameters
from gradstream.engine.models.full_experts import FullExperts
from gradstream.engine.models.full_linear import FullLinear
from gradstream.engine.models.merged_qkv import MergedLinear, merge_adapted, merge_trained
from gradstream.engine.models.offload import ActivationOffload
from gradstream.engine.models.probe import Probe
from gradstream.engine.models.refusals import check_config
from gradstream.engine.models.sites import adapt
from gradstream.engine.models.switches import exchange_functions, has_experts, is_grouped
from gradstream.engine.models.trainable import train_fully
from gradstream.engine.models.units import find_units, recompute
from gradstream.engine.vocabulary import warm_up
from gradstream.shared.errors import Unsupported

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How a model is made of its files.

    attention: a name in attention.registry.ATTENTION, or "auto". is_lora: it is frozen, for adapters; else its weights train.
    freeze_router: the weights that choose experts do not. memory: what passes keep. config_path: a directory whose config.json is used
    in place of the model's. init_device: cpu takes the weights through host memory, meta and cuda fill the device from the files.
    only_safetensors: other weight files are refused. is_dcp: the weights are files of torch.distributed.checkpoint beside config.json.
    log_router_stats: what experts get can be counted.
    """

    attention: str = AUTO
    numerics: Numerics = field(default_factory=Numerics)
    memory: Memory = field(default_factory=Memory)
    is_lora: bool = True
    freeze_router: bool = True
    config_path: Path | None = None
    init_device: Literal["cpu", "meta", "cuda"] = "meta"
    only_safetensors: bool = False
    is_dcp: bool = False
    log_router_stats: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> "Build":
        """As an engine's config says."""
        return cls(
            attention=config.attention,
            numerics=config.numerics,
            memory=config.memory,
            is_lora=config.is_lora,
            freeze_router=config.freeze_router,
            config_path=config.config_path,
            init_device=config.init_device,
            log_router_stats=config.log_router_stats,
            only_safetensors=config.load_weights_mode == "safetensors",
            is_dcp=config.load_weights_mode == "dcp",
        )


def load_base(path: Path, *, device: torch.device, dtype: torch.dtype, build: Build | None = None) -> BaseModel:
    """The model in path (safetensors, sharded or not), on device in dtype: frozen, for adapters, or with trainable weights.

    build None: the defaults. Raises Unsupported when it is no causal LM that the engine computes exactly: fields of its config that are
    known to matter are checked first, and then the packed pass is compared with transformers' own forward on a few tokens.
    """
    build = Build() if build is None else build
    if build.init_device == "cuda" and device.type != "cuda":
        raise Unsupported(f"init_device: cuda needs a GPU, and the model is to be on {device.type}; use meta or cpu")
    check_config(_config(path, build))
    causal_lm = load_causal_lm(path, dtype=dtype, device=device, build=build).to(device).eval().requires_grad_(False)
    return seam(causal_lm, digest=model_digest(path, config_dir=build.config_path), build=build)


def _config(path: Path, build: Build) -> PretrainedConfig:
    config_dir = build.config_path or path
    if not (config_dir / "config.json").is_file():
        name = "model_path" if build.config_path is None else "config_path"
        raise Unsupported(f"{name}: {config_dir} holds no config.json; it must be a Hugging Face model directory")
    with _refusing_unreadable(path):
        config: PretrainedConfig = AutoConfig.from_pretrained(config_dir, local_files_only=True)
    return config


def load_causal_lm(
    path: Path,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device = _CPU,
    build: Build | None = None,
) -> nn.Module:
    """transformers' model with every weight from the files: what they lack would be left at random values.

    dtype "auto" is that of the files. The model is on device where build says so, else on the CPU.
    Raises Unsupported when path cannot be read as a model.
    """
    build = Build() if build is None else build
    transformers_logging.disable_progress_bar()
    options: dict[str, object] = {"attn_implementation": "sdpa", "local_files_only": True}
    if (place := _direct(build, device)) is not None:
        options["device_map"] = {"": place}
    causal_lm: nn.Module
    if build.is_dcp:
        assert isinstance(dtype, torch.dtype), "a checkpoint has the dtype of its master weights, which is no choice"
        with _refusing_unreadable(path):
            causal_lm, info = load_dcp_model(path, _config(path, build), dtype=dtype, options=options)
    else:
        causal_lm, info = _load_files(path, build, {**options, "dtype": dtype})
    if missing := sorted(info["missing_keys"]):
        raise Unsupported(f"model_path: {path} lacks {len(missing)} weights of its model, {missing[0]} among them")
    return causal_lm


# Any: what transformers tells of a loading.
def _load_files(path: Path, build: Build, options: dict[str, object]) -> tuple[nn.Module, dict[str, Any]]:
    """transformers' model of a Hugging Face directory, and what it has to say of the loading."""
    if build.config_path is not None:
        options["config"] = _config(path, build)
    if build.only_safetensors:
        options["use_safetensors"] = True
    with _refusing_unreadable(path):
        causal_lm, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    return causal_lm, info


def _direct(build: Build, device: torch.device) -> torch.device | None:
    """The device that is filled from the files without a copy in host memory; None where the CPU is."""
    if build.init_device == "cpu" or device.type == "cpu":
        return None
    if importlib.util.find_spec("accelerate") is None:
        raise Unsupported(
            f"init_device: {build.init_device} needs the package accelerate, by which transformers fills a GPU; "
            "install it, or use cpu"
        )
    return device


@contextmanager
def _refusing_unreadable(path: Path) -> Iterator[None]:
    """Files that are absent, cut or of another shape are a mistake in model_path, which a restart cannot mend."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(f"model_path: {path} cannot be read as a Hugging Face model: {reason}") from error


def seam(causal_lm: nn.Module, *, digest: str, build: Build | None = None) -> BaseModel:
    """The BaseModel of a transformers model in memory, which is changed in place. Raises Unsupported like load_base."""
    build = Build() if build is None else build
    config: Any = causal_lm.config  # each family has its own config class
    for part in ("model.layers", "model.embed_tokens", "model.norm", "lm_head"):
        if not _has(causal_lm, part):
            raise Unsupported(
                f"model: {type(causal_lm).__name__} has no {part}; its layout is not that of Llama or Qwen3"
            )
    weight = causal_lm.get_parameter("lm_head.weight")
    run = choose_attention(build.attention, device=weight.device, dtype=weight.dtype)
    probe = Probe.of(causal_lm)
    config._attn_implementation = implementation(  # noqa: SLF001 (transformers has no public setter that skips its checks)
        casts_bf16=build.numerics.attention_cast_bf16, is_compiled=build.numerics.enable_compile
    )
    facts = ModelFacts(
        architecture=type(causal_lm).__name__,
        vocab_size=int(weight.shape[0]),
        num_layers=len(causal_lm.get_submodule("model.layers")),  # type: ignore[arg-type]  # a ModuleList
        max_position=int(config.max_position_embeddings),
        digest=digest,
    )
    if build.numerics.ce_mode == "compiled":
        require_compiler(weight.device, asked="ce_mode: compiled", instead="eager")
        warm_up(facts.vocab_size, weight.device)
    base = BaseModel(causal_lm, facts=facts, seams=_exchange(causal_lm, build, run), numerics=build.numerics)
    probe.check(base)
    return base


def _exchange(causal_lm: nn.Module, build: Build, run: PackedAttention) -> Seams:
    """Put our modules into the model: with sites for adapters, or with a flat tensor of trained weights."""
    numerics = build.numerics
    memory = build.memory
    units = find_units(causal_lm, memory.basic_modules)
    exchange_functions(causal_lm, numerics)
    grouped = is_grouped(causal_lm, numerics)
    layers = causal_lm.get_submodule("model.layers")
    slot = PassSlot()
    sites: list[Site] = []
    flat: FlatParameters | None = None
    if build.is_lora:
        sites = adapt(causal_lm, slot, is_grouped=grouped)
        if numerics.merge_qkv:
            merge_adapted(layers)
    else:
        flat = train_fully(causal_lm, freeze_router=build.freeze_router, is_grouped=grouped)
        if numerics.merge_qkv:
            merge_trained(layers, prefix="model.layers", fuse=flat.fuse)
    loads = ExpertLoads(causal_lm) if build.log_router_stats and has_experts(causal_lm) else None
    if numerics.enable_compile:
        require_compiler(
            causal_lm.get_parameter("lm_head.weight").device, asked="enable_compile: true", instead="false"
        )
        apart = (AdaptedLinear, AdaptedExperts, MergedLinear, FullExperts, FullLinear)
        compile_layers(causal_lm, apart=apart, units=units)
    if memory.enable_gradient_checkpointing:
        recompute(causal_lm, units, slot, is_reentrant=memory.enable_reentrant)
    offload = ActivationOffload(causal_lm) if memory.enable_activation_offload else None
    return Seams(sites=tuple(sites), slot=slot, attention=run, flat=flat, offload=offload, loads=loads)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
