"""A checkpoint of full weights as a Hugging Face directory, without an engine."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from gradstream.engine.checkpoint import formats
from gradstream.engine.checkpoint.formats._base import FORMATS, MODEL, Reader
from gradstream.engine.checkpoint.huggingface import DTYPE, SHARD_BYTES, Family, write_huggingface
from gradstream.engine.checkpoint.manifest import Manifest
from gradstream.engine.registry import import_siblings

import_siblings(formats)


def write_exported(draft: Path, checkpoint_dir: Path, family: Family, manifest: Manifest) -> None:
    """Fill draft with the model of a verified checkpoint, in bfloat16; the optimizer's state is left behind.

    What was saved for inference is copied; else config and tokenizer are those of family. Raises StorageFailure, OSError.
    """
    assert manifest.full is not None
    if manifest.full.format not in FORMATS:
        for name in manifest.files:
            shutil.copyfile(checkpoint_dir / name, draft / name)
        return
    reader = FORMATS[manifest.full.format].open(checkpoint_dir)
    try:
        shapes = {
            name.removeprefix(MODEL): stored.shape for name, stored in reader.tensors.items() if name.startswith(MODEL)
        }
        write_huggingface(
            draft, shapes, lambda name: _value(reader, name, shapes[name]), family, shard_bytes=SHARD_BYTES
        )
    finally:
        reader.close()


def _value(reader: Reader, name: str, shape: tuple[int, ...]) -> Tensor:
    value = torch.empty(shape, dtype=DTYPE)
    reader.read({f"{MODEL}{name}": value})
    return value
