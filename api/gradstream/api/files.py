"""A checkpoint's files on the shared output directory: where one lies, and all of them as one tar stream."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradstream.shared.errors import UnknownModel, Unsupported

_CHUNK_BYTES = 1 << 20
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of one checkpoint: sizes in bytes, by path below directory."""

    directory: Path
    sizes: Mapping[str, int]


def files_of(record: Mapping[str, str], *, output_dir: Path | None) -> Files:
    """The checkpoint's files, as the worker recorded them; raises Unsupported when this process cannot serve them."""
    if output_dir is None or "files" not in record:
        raise Unsupported("the files of this checkpoint cannot be served: the API does not see the worker's output_dir")
    root = output_dir.resolve()
    directory = (root / record["directory"]).resolve()
    if not directory.is_relative_to(root):
        raise Unsupported("the files of this checkpoint cannot be served: they do not lie in output_dir")
    return Files(directory=directory, sizes=json.loads(record["files"]))


def file_path(files: Files, name: str) -> Path:
    """Where one of the files lies; raises UnknownModel unless the checkpoint has a file of exactly that name."""
    path = files.directory / name
    if name not in files.sizes or not path.resolve().is_relative_to(files.directory) or not path.is_file():
        raise UnknownModel(f"this checkpoint has no file {name[:200]!r}")
    return path


def tar_size(files: Files) -> int:
    """The bytes of the tar stream."""
    return sum(tarfile.BLOCKSIZE + _padded(size) for size in files.sizes.values()) + len(_END)


def tar_stream(files: Files) -> Iterator[bytes]:
    """The files as an uncompressed tar of tar_size bytes. Raises OSError when one changed since it was recorded, which cuts the stream."""
    for name, size in sorted(files.sizes.items()):
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        # The plainer USTAR has no number for a file of 8 GiB or more, as a full-weight checkpoint may have.
        yield info.tobuf(format=tarfile.GNU_FORMAT)
        with file_path(files, name).open("rb") as file:
            left = size
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise OSError(f"{name} is shorter than its recorded {size} bytes")
                left -= len(chunk)
                yield chunk
        yield bytes(_padded(size) - size)
    yield _END


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
