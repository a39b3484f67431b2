"""Full weights in the files of torch.distributed.checkpoint, which any number of ranks can load in shards of their own."""

import io
import pickle  # noqa: TID251 (the form of torch's metadata, of which `_Unpickler` lets nothing else in)
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from gradstream.engine.checkpoint.formats._base import FORMATS, Format, Stored, system_errors
from gradstream.shared.errors import StorageFailure

METADATA_FILE = ".metadata"
# A torch.save of its own for each tensor, and its entry in the metadata.
_BYTES_PER_TENSOR = 4096

# Everything that the metadata of plain tensors is made of; nothing else is unpickled.
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata")),
}


def write_dcp(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file of data and one of metadata; a tensor at a time is copied to host memory."""
    writer = _Writer(directory, single_file_per_rank=True, sync_files=False)
    with system_errors(), warnings.catch_warnings():
        # That it saves alone, which is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(dict(tensors), storage_writer=writer, no_dist=True)


def open_dcp(directory: Path) -> "DcpReader":
    """The files below directory; see `Format`."""
    return DcpReader(directory)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Neither a path nor a random id: equal tensors make equal files."""
        return StorageMeta()


class DcpReader:
    """A `Reader` of what any number of ranks wrote."""

    def __init__(self, directory: Path) -> None:
        self._metadata = _read_metadata(directory / METADATA_FILE)
        self._stack = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for name in sorted({info.relative_path for info in self._metadata.storage_data.values()}):
            # The digests that were checked are of files in this directory.
            if Path(name).name != name:
                raise StorageFailure(f"{directory / METADATA_FILE} names {name!r}, which is no file beside it")
            try:
                self._files[name] = self._stack.enter_context((directory / name).open("rb"))
            except OSError as error:
                self.close()
                raise StorageFailure(f"{directory / name} cannot be read: {error.strerror}") from error

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {
            name: Stored(entry.properties.dtype, tuple(entry.size))
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @torch.no_grad()
    def read(self, targets: Mapping[str, Tensor]) -> None:
        missing = {name: target.numel() for name, target in targets.items()}
        for index, info in self._metadata.storage_data.items():
            if (target := targets.get(index.fqn)) is None:
                continue
            file = self._files[info.relative_path]
            file.seek(info.offset)
            part = torch.load(io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True)
            place = tuple(
                slice(start, start + size) for start, size in zip(index.offset or (), part.shape, strict=True)
            )
            target[place].copy_(part)
            missing[index.fqn] -= part.numel()
        if wrong := [name for name, number in missing.items() if number]:
            raise RuntimeError(f"{wrong[0]!r} is not whole in its files")

    def close(self) -> None:
        self._stack.close()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 (what a name stands for)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except OSError as error:
        raise StorageFailure(f"{path} cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise StorageFailure(f"{path} is no metadata of torch.distributed.checkpoint: {error}") from error
    if not isinstance(metadata, Metadata):
        raise StorageFailure(f"{path} is no metadata of torch.distributed.checkpoint")
    return metadata


FORMATS.register("dcp")(Format(write=write_dcp, open=open_dcp, bytes_per_tensor=_BYTES_PER_TENSOR))
