"""Token ids to text, for stop texts; without transformers, which takes seconds to load a tokenizer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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


def eos_token_ids(model_dir: Path) -> frozenset[int]:
    """The tokens that end a reply: of generation_config.json if it names some, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """What the sampler knows of a model's text. decoder is None without a tokenizer.json."""

    eos_token_ids: frozenset[int]
    decoder: TextDecoder | None


@cache
def model_text(model_dir: Path) -> ModelText:
    """The text facts of a model directory, read once per process; its files do not change while it is served."""
    return ModelText(eos_token_ids=eos_token_ids(model_dir), decoder=open_decoder(model_dir))
