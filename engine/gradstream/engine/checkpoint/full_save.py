"""What a save of full weights writes: a checkpoint to train on, or a Hugging Face directory."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gradstream.engine.checkpoint import formats
from gradstream.engine.checkpoint.formats._base import FORMATS, MODEL
from gradstream.engine.checkpoint.full import content_of
from gradstream.engine.checkpoint.huggingface import SHARD_BYTES, Family, huggingface_size_bytes, write_huggingface
from gradstream.engine.checkpoint.manifest import FullFacts
from gradstream.engine.checkpoint.save import Facts
from gradstream.engine.config import EngineConfig
from gradstream.engine.files import storage_errors
from gradstream.engine.models.full import FullModel
from gradstream.engine.registry import import_siblings
from gradstream.engine.state import EngineState

import_siblings(formats)

TrainingFormat = Literal["dcp", "torch"]

_DTYPES: dict[torch.dtype, Literal["float32", "bfloat16"]] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Manifest, directory entries, metadata of the format.
_FIXED_BYTES = 64 * 1024
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class TrainingFiles:
    """Master weights and optimizer, in their own dtypes, and the parameters that are not trained; and config.json of config_dir.

    format: a name in FORMATS.

    Before the first step the optimizer's state is zero, and left out.
    """

    model: FullModel
    frozen: Mapping[str, Tensor]
    format: TrainingFormat
    config_dir: Path
    architecture: str

    @property
    def has_state(self) -> bool:
        return self.model.step > 0

    @property
    def facts(self) -> Facts:
        full = FullFacts(
            format=self.format,
            dtype=_DTYPES[self.model.weights.dtype],
            architecture=self.architecture,
            has_state=self.has_state,
        )
        return Facts(has_optimizer=True, full=full)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return content_of(self.model, self.frozen, has_state=self.has_state)

    def size_bytes(self) -> int:
        per_tensor = FORMATS[self.format].bytes_per_tensor
        return _FIXED_BYTES + sum(tensor.nbytes + per_tensor for tensor in self._tensors.values())

    def write(self, draft: Path) -> None:
        FORMATS[self.format].write(draft, self._tensors)
        shutil.copyfile(self.config_dir / CONFIG_FILE, draft / CONFIG_FILE)


@dataclass(frozen=True)
class HuggingFaceFiles:
    """The weights rounded to bfloat16, as transformers and inference servers read them."""

    model: FullModel
    frozen: Mapping[str, Tensor]
    family: Family
    architecture: str
    shard_bytes: int = SHARD_BYTES

    @property
    def facts(self) -> Facts:
        full = FullFacts(format="huggingface", dtype="bfloat16", architecture=self.architecture, has_state=False)
        return Facts(has_optimizer=False, full=full)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        found = content_of(self.model, self.frozen, has_state=False)
        return {name.removeprefix(MODEL): tensor for name, tensor in found.items() if name.startswith(MODEL)}

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def size_bytes(self) -> int:
        with storage_errors(f"cannot read the model's config in {self.family.config_dir}"):
            return huggingface_size_bytes(self._shapes, self.family)

    def write(self, draft: Path) -> None:
        write_huggingface(draft, self._shapes, self._tensors.__getitem__, self.family, shard_bytes=self.shard_bytes)


def training_files(state: EngineState, model: FullModel) -> TrainingFiles:
    """What save_weights writes, in the format that the server is set to."""
    return TrainingFiles(
        model=model,
        frozen=state.flat.frozen,
        format=state.config.ckpt_manager,
        config_dir=_config_dir(state.config),
        architecture=state.base.facts.architecture,
    )


def huggingface_files(state: EngineState, model: FullModel) -> HuggingFaceFiles:
    """What save_weights_for_sampler and save_weights_external write."""
    config = state.config
    return HuggingFaceFiles(
        model=model,
        frozen=state.flat.frozen,
        family=Family(config_dir=_config_dir(config), tokenizer_dir=config.tokenizer_path or config.model_path),
        architecture=state.base.facts.architecture,
    )


def _config_dir(config: EngineConfig) -> Path:
    return config.config_path or config.model_path
