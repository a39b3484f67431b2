"""Token ids to text, for stop texts; without transformers, which takes seconds to load a tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer


class TextDecoder(Protocol):
    """What stop texts need of a tokenizer."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens written out; a cut character at an end becomes U+FFFD."""
        ...


class FileDecoder:
    """The tokenizer.json of a model directory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def open_decoder(model_dir: Path) -> TextDecoder | None:
    """The decoder of a model directory, None when it has no tokenizer.json."""
    path = model_dir / "tokenizer.json"
    return FileDecoder(Tokenizer.from_file(str(path))) if path.is_file() else None
