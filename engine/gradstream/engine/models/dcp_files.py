"""transformers' model with weights from files of torch.distributed.checkpoint, as checkpoints of full weights have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gradstream.engine.checkpoint.formats._base import MODEL
from gradstream.engine.checkpoint.formats.dcp import METADATA_FILE, open_dcp
from gradstream.shared.errors import GradstreamError, Unsupported


def load_dcp_model(
    path: Path, config: PretrainedConfig, *, dtype: torch.dtype, options: Mapping[str, object]
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and what transformers has to say of its loading. options: those of from_pretrained.

    The weights go through host memory. Raises Unsupported when path holds no such files.
    """
    if not (path / METADATA_FILE).is_file():
        raise Unsupported(
            f"load_weights_mode: dcp needs a checkpoint of torch.distributed.checkpoint, and {path} has no {METADATA_FILE}"
        )
    try:
        reader = open_dcp(path)
    except GradstreamError as error:
        raise Unsupported(f"model_path: {error.message}") from error
    try:
        weights = {
            name.removeprefix(MODEL): torch.empty(stored.shape, dtype=dtype)
            for name, stored in reader.tensors.items()
            if name.startswith(MODEL)
        }
        reader.read({f"{MODEL}{name}": value for name, value in weights.items()})
    finally:
        reader.close()
    # Any: each family of transformers has its own class.
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = family.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **options
    )
    return model, info
