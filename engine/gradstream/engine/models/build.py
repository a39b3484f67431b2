"""A Hugging Face model directory becomes a BaseModel."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gradstream.engine.adapters.modules import PassSlot
from gradstream.engine.attention.choose import AUTO, choose_attention
from gradstream.engine.attention.seam import IMPLEMENTATION, register
from gradstream.engine.models.base import BaseModel, ModelFacts
from gradstream.engine.models.digest import model_digest
from gradstream.engine.models.probe import Probe
from gradstream.engine.models.refusals import check_config
from gradstream.engine.models.sites import adapt
from gradstream.engine.models.trainable import train_fully
from gradstream.shared.errors import Unsupported


def load_base(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = AUTO,
    is_lora: bool = True,
    freeze_router: bool = True,
) -> BaseModel:
    """The model in path (safetensors, sharded or not), on device in dtype: frozen, for adapters, or with trainable weights.

    Raises Unsupported when it is no causal LM that the engine computes exactly: fields of its config that are known to matter
    are checked first, and then the packed pass is compared with transformers' own forward on a few tokens.
    """
    if not (path / "config.json").is_file():
        raise Unsupported(f"model_path: {path} holds no config.json; it must be a Hugging Face model directory")
    with _refusing_unreadable(path):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    check_config(config)
    register()
    causal_lm = load_causal_lm(path, dtype=dtype).to(device).eval().requires_grad_(False)
    return seam(causal_lm, attention=attention, digest=model_digest(path), is_lora=is_lora, freeze_router=freeze_router)


def load_causal_lm(path: Path, *, dtype: torch.dtype | Literal["auto"]) -> nn.Module:
    """transformers' model on the CPU, with every weight from the files: what they lack would be left at random values.

    dtype "auto" is that of the files. Raises Unsupported when path cannot be read as a model.
    """
    transformers_logging.disable_progress_bar()
    causal_lm: nn.Module
    with _refusing_unreadable(path):
        causal_lm, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise Unsupported(f"model_path: {path} lacks {len(missing)} weights of its model, {missing[0]} among them")
    return causal_lm


@contextmanager
def _refusing_unreadable(path: Path) -> Iterator[None]:
    """Files that are absent, cut or of another shape are a mistake in model_path, which a restart cannot mend."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(f"model_path: {path} cannot be read as a Hugging Face model: {reason}") from error


def seam(
    causal_lm: nn.Module, *, attention: str, digest: str, is_lora: bool = True, freeze_router: bool = True
) -> BaseModel:
    """The BaseModel of a transformers model in memory, which is changed in place. Raises Unsupported like load_base."""
    config: Any = causal_lm.config  # each family has its own config class
    for part in ("model.layers", "model.embed_tokens", "model.norm", "lm_head"):
        if not _has(causal_lm, part):
            raise Unsupported(
                f"model: {type(causal_lm).__name__} has no {part}; its layout is not that of Llama or Qwen3"
            )
    weight = causal_lm.get_parameter("lm_head.weight")
    run = choose_attention(attention, device=weight.device, dtype=weight.dtype)
    probe = Probe.of(causal_lm)
    config._attn_implementation = IMPLEMENTATION  # noqa: SLF001 (transformers has no public setter that skips its checks)
    slot = PassSlot()
    sites = adapt(causal_lm, slot) if is_lora else []
    flat = None if is_lora else train_fully(causal_lm, freeze_router=freeze_router)
    facts = ModelFacts(
        architecture=type(causal_lm).__name__,
        vocab_size=int(weight.shape[0]),
        num_layers=len(causal_lm.get_submodule("model.layers")),  # type: ignore[arg-type]  # a ModuleList
        max_position=int(config.max_position_embeddings),
        digest=digest,
    )
    base = BaseModel(causal_lm, facts=facts, sites=sites, slot=slot, attention=run, flat=flat)
    probe.check(base)
    return base


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
