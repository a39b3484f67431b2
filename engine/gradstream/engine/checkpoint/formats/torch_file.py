"""Full weights in one file of torch.save: {"model": {name: tensor}, "optim": {part.name: tensor}, "step": tensor}."""

import pickle  # noqa: TID251 (the name of an error that torch.load raises)
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gradstream.engine.checkpoint.formats._base import FORMATS, MODEL, OPTIM, STEP, Format, Stored, system_errors
from gradstream.shared.errors import StorageFailure

FILE = "checkpoint.pt"
_BYTES_PER_TENSOR = 2048


def write_torch(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file; a tensor at a time is copied to host memory."""
    content: dict[str, object] = {
        part.removesuffix("."): {
            name.removeprefix(part): _apart(tensor) for name, tensor in tensors.items() if name.startswith(part)
        }
        for part in (MODEL, OPTIM)
    }
    if STEP in tensors:
        content[STEP] = tensors[STEP]
    with system_errors(), (directory / FILE).open("wb") as file:
        torch.save(content, file)


def open_torch(directory: Path) -> "TorchReader":
    """The file in directory; see `Format`."""
    return TorchReader(directory / FILE)


class TorchReader:
    """A `Reader` of a mapped file."""

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as error:
            raise StorageFailure(f"{path} cannot be read: {error.strerror}") from error
        except (RuntimeError, pickle.UnpicklingError, ValueError) as error:
            raise StorageFailure(f"{path} cannot be read by torch.load: {error}") from error
        self._found = _flat(content)
        if not self._found:
            raise StorageFailure(f"{path} holds no model")

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._found.items()}

    @torch.no_grad()
    def read(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(self._found[name])

    def close(self) -> None:
        self._found = {}


def _apart(tensor: Tensor) -> Tensor:
    """The same values as a storage of their own, without a copy: torch.save writes storages whole, and these share one."""
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    apart = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return apart.set_(storage, 0, tensor.shape, tensor.stride())


def _flat(content: object) -> dict[str, Tensor]:
    """Every tensor of a file by its name here."""
    if not isinstance(content, dict):
        return {}
    found = {
        f"{part}{name}": tensor
        for part in (MODEL, OPTIM)
        for name, tensor in content.get(part.removesuffix("."), {}).items()
    }
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


FORMATS.register("torch")(Format(write=write_torch, open=open_torch, bytes_per_tensor=_BYTES_PER_TENSOR))
