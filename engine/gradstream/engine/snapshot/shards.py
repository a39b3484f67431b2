"""Tensors in one safetensors file a rank, in the sharded layout of torch.distributed.checkpoint."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradstream.engine.checkpoint.peft_format import write_tensors
from gradstream.engine.snapshot.cut import DType, WholeTensor, shard_name
from gradstream.shared.errors import StorageFailure

_DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# What torch.distributed.checkpoint.hf_storage reads and writes: keys of a file's header, and their values' form.
_SHARDING_KEY = "DCP_SHARDING_INFO"
_VERSION_KEY = "DCP_VERSION"
_VERSION = "1.0"
_OFFSETS_KEY = "saved_offsets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank holds of a tensor: a block that begins at offsets, one number a dimension, of the whole."""

    tensor: Tensor
    offsets: tuple[int, ...]


def torch_dtype(tensor: WholeTensor) -> torch.dtype:
    """The dtype of a tensor that is described."""
    return _DTYPES[tensor.dtype]


def whole(tensor: Tensor) -> WholeTensor:
    """The description of a tensor that is all here."""
    return WholeTensor(dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape))


def whole_part(tensor: Tensor) -> Part:
    """The part of a tensor that is all here."""
    return Part(tensor=tensor, offsets=(0,) * tensor.dim())


def write_shard(directory: Path, parts: Mapping[str, Part], *, rank: int) -> None:
    """Write a rank's file into directory; raises OSError, with the system's number, when the file system refuses."""
    places = {name: {_OFFSETS_KEY: list(part.offsets)} for name, part in parts.items()}
    metadata = {_SHARDING_KEY: json.dumps(places), _VERSION_KEY: _VERSION, "format": "pt"}
    tensors = {name: part.tensor.contiguous() for name, part in parts.items()}
    write_tensors(directory / shard_name(rank), tensors, metadata=metadata)


def read_shards(directory: Path, names: Iterable[str], tensors: Mapping[str, WholeTensor]) -> dict[str, Tensor]:
    """Each of the tensors, whole, on the CPU, put together from files of any number of ranks.

    names: the files below directory. Raises StorageFailure, naming file or tensor, when one cannot be read, a part does not lie
    within its tensor, or parts are missing.
    """
    found = {name: torch.empty(facts.shape, dtype=_DTYPES[facts.dtype]) for name, facts in tensors.items()}
    missing = {name: prod(facts.shape) for name, facts in tensors.items()}
    for name in names:
        for key, part in _read_file(directory / name).items():
            if key not in found:
                raise StorageFailure(f"{directory / name} holds {key!r}, which its manifest does not name")
            _put(found[key], part, what=f"{key!r} of {directory / name}")
            missing[key] -= part.tensor.numel()
    for key, number in missing.items():
        if number:
            raise StorageFailure(f"{directory}: {key!r} has {number} values too few (or too many, if negative)")
    return found


def _read_file(path: Path) -> dict[str, Part]:
    try:
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {})[_SHARDING_KEY])
            return {
                key: Part(tensor=file.get_tensor(key), offsets=tuple(places[key][_OFFSETS_KEY]))
                for key in sorted(file.keys())
            }
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise StorageFailure(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _put(target: Tensor, part: Part, *, what: str) -> None:
    """Copy a part to its place; raises StorageFailure when it lies outside or has another dtype."""
    shape = part.tensor.shape
    fits = (
        part.tensor.dtype == target.dtype
        and len(shape) == len(part.offsets) == target.dim()
        and all(
            start >= 0 and start + size <= limit
            for start, size, limit in zip(part.offsets, shape, target.shape, strict=True)
        )
    )
    if not fits:
        raise StorageFailure(
            f"{what} is {part.tensor.dtype} {list(shape)} at {list(part.offsets)}; it must lie within {target.dtype} {list(target.shape)}"
        )
    target[tuple(slice(start, start + size) for start, size in zip(part.offsets, shape, strict=True))] = part.tensor
