"""A short name for the exact weights in a model directory."""

import hashlib
from pathlib import Path

_SAMPLE_BYTES = 1 << 20
_SUFFIXES = (".safetensors", ".bin", ".distcp")


def model_digest(path: Path, *, config_dir: Path | None = None) -> str:
    """128-bit BLAKE2b, hex, of config.json (of config_dir, None for path) and, for each weight file, its name, size, first and last MiB.

    The start of a safetensors file holds every tensor's name, dtype, shape and place, so this tells models apart without
    reading them whole.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(((config_dir or path) / "config.json").read_bytes())
    for file in sorted(entry for entry in path.iterdir() if entry.suffix in _SUFFIXES):
        size_bytes = file.stat().st_size
        digest.update(f"\0{file.name}\0{size_bytes}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size_bytes - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
