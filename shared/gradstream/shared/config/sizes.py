"""Sizes as people write them, to bytes and back."""

import re
from fractions import Fraction

_UNITS = {"B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3, "TB": 1024**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "10TB", "512 MB", "1.5GB" or "4096"; units are powers of 1024. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512MB, 10GB or a number of bytes")
    return int(Fraction(match[1]) * _UNITS[match[2].upper() + "B"])


def format_size(size_bytes: int) -> str:
    """The shortest text that parse_size turns back into size_bytes."""
    for unit, factor in reversed(_UNITS.items()):
        if size_bytes >= factor and size_bytes % factor == 0:
            return f"{size_bytes // factor}{'' if factor == 1 else unit}"
    return str(size_bytes)
