"""The tokenizer inside a GGUF file, as the files that transformers' AutoTokenizer loads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from gradstream.shared.errors import Unsupported


class _TokenType(IntEnum):
    """The values of tokenizer.ggml.token_type that matter here."""

    CONTROL = 3
    USER_DEFINED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token ids with a role; None when the model has no such token."""

    bos: int | None
    eos: int | None
    pad: int | None
    unknown: int | None

    def config_ids(self) -> dict[str, object]:
        """The entries of config.json and generation_config.json."""
        ids = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}
        return {name: value for name, value in ids.items() if value is not None}


def write_tokenizer(fields: Mapping[str, Any], directory: Path, *, max_length: int) -> SpecialTokens:
    """Write tokenizer.json and tokenizer_config.json into directory.

    fields is the GGUF's metadata by key. Raises Unsupported unless it is a byte-level BPE with a known pre-tokenizer.
    """
    # Any: GGUF metadata values are numbers, texts and lists of either, known only by their key.
    special = SpecialTokens(
        bos=fields.get("tokenizer.ggml.bos_token_id"),
        eos=fields.get("tokenizer.ggml.eos_token_id"),
        pad=fields.get("tokenizer.ggml.padding_token_id"),
        unknown=fields.get("tokenizer.ggml.unknown_token_id"),
    )
    _build(fields, special).save(str(directory / "tokenizer.json"))
    config = _tokenizer_config(fields, special, max_length=max_length)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return special


def _build(fields: Mapping[str, Any], special: SpecialTokens) -> Tokenizer:
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise Unsupported(f"the GGUF's tokenizer is {kind!r}; only byte-level BPE ('gpt2') can be converted")
    texts: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [_pair(merge) for merge in fields["tokenizer.ggml.merges"]]
    # ignore_merges stays off: a vocabulary entry is reached through its merges only.
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(texts)}, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields.get("tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    for text, kind in zip(texts, fields.get("tokenizer.ggml.token_type", []), strict=False):
        if kind == _TokenType.CONTROL:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == _TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    if fields.get("tokenizer.ggml.add_bos_token", False) and special.bos is not None:
        bos = texts[special.bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special.bos)]
        )
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before BPE, by the GGUF's name for it.

    transformers' own GGUF reader uses plain byte level for all of them, which cuts several spaces before a digit elsewhere.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match name:
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        case "gpt-2" | "default":
            return byte_level
        case "llama-bpe":
            split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        case _:
            raise Unsupported(
                f"the GGUF's pre-tokenizer is {name!r}; known are 'smollm', 'gpt-2', 'default' and 'llama-bpe'"
            )


_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _tokenizer_config(fields: Mapping[str, Any], special: SpecialTokens, *, max_length: int) -> dict[str, object]:
    texts: list[str] = fields["tokenizer.ggml.tokens"]
    roles = {
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unknown,
    }
    config: dict[str, object] = {name: texts[index] for name, index in roles.items() if index is not None}
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return {
        **config,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
