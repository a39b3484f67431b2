"""A llama-architecture GGUF file as a Hugging Face model directory.

Weights are dequantised and stored as float32: a 4-bit block is scale * q + offset with float16 scale and offset, which bfloat16 would
round once more. The directory is twice the size of a bfloat16 one, and its numbers are exactly those of the GGUF.
"""

# Shape letters: D hidden, H heads of the projection, K head size.

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gradstream.engine.files import whole_directory
from gradstream.engine.models.gguf_tokenizer import write_tokenizer
from gradstream.shared.errors import InvalidRequest, StorageFailure, Unsupported

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ARCHITECTURE = "llama"
_WRITTEN_FOR = "5.17.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The sizes of the model as the GGUF states them."""

    num_layers: int
    context_length: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope_theta: float
    rms_norm_eps: float
    vocab_size: int
    is_tied: bool


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model in source as directory target, which appears complete or not at all.

    Raises FileExistsError when target exists, StorageFailure when it cannot be written, else as `write_model`.
    """
    with whole_directory(target) as draft:
        write_model(source, draft)


def write_model(source: Path, directory: Path) -> None:
    """Write the model in source into an existing directory.

    It gets config.json, model.safetensors (float32), tokenizer.json, tokenizer_config.json with the chat template, and
    generation_config.json. Raises StorageFailure when source does not exist, InvalidRequest when it is no GGUF file, Unsupported
    when it holds anything but a plain llama model with a byte-level BPE tokenizer.
    """
    reader = _open(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    shape = _shape_of(fields, {tensor.name for tensor in reader.tensors})
    special = write_tokenizer(fields, directory, max_length=shape.context_length)
    tokens = special.config_ids()
    _write_json(directory / "config.json", {**_config(shape), **tokens})
    _write_json(directory / "generation_config.json", {**tokens, "transformers_version": _WRITTEN_FOR})
    weights = {name: value for tensor in reader.tensors for name, value in [_convert(tensor, shape)]}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _open(source: Path) -> GGUFReader:
    if not source.is_file():
        raise StorageFailure(f"{source}: no such file")
    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise InvalidRequest(f"{source}: not a readable GGUF file ({error})") from error


def _shape_of(fields: Mapping[str, Any], tensors: set[str]) -> _Shape:
    # Any: GGUF metadata values are numbers, texts and lists of either, known only by their key.
    architecture = fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise Unsupported(f"the GGUF holds a {architecture!r} model; only {_ARCHITECTURE!r} models can be converted")
    _refuse_variants(fields, tensors)
    num_heads = int(_need(fields, "llama.attention.head_count"))
    hidden_size = int(_need(fields, "llama.embedding_length"))
    head_size = int(fields.get("llama.attention.key_length", hidden_size // num_heads))
    rotated = int(fields.get("llama.rope.dimension_count", head_size))
    if rotated != head_size:
        raise Unsupported(
            f"the GGUF rotates {rotated} of {head_size} sizes of a head; only whole heads can be converted"
        )
    return _Shape(
        num_layers=int(_need(fields, "llama.block_count")),
        context_length=int(_need(fields, "llama.context_length")),
        hidden_size=hidden_size,
        mlp_size=int(_need(fields, "llama.feed_forward_length")),
        num_heads=num_heads,
        num_kv_heads=int(fields.get("llama.attention.head_count_kv", num_heads)),
        head_size=head_size,
        rope_theta=_as_written(fields.get("llama.rope.freq_base", 10_000.0)),
        rms_norm_eps=_as_written(_need(fields, "llama.attention.layer_norm_rms_epsilon")),
        vocab_size=len(_need(fields, "tokenizer.ggml.tokens")),
        is_tied="output.weight" not in tensors,
    )


def _refuse_variants(fields: Mapping[str, Any], tensors: set[str]) -> None:
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise Unsupported("the GGUF scales its rotary positions; only models without rope scaling can be converted")
    if fields.get("llama.expert_count", 0):
        raise Unsupported("the GGUF holds a mixture of experts; only dense llama models can be converted")


def _need(fields: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - a metadata value of any GGUF type
    if key not in fields:
        raise InvalidRequest(f"the GGUF has no field {key!r}")
    return fields[key]


def _as_written(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(shape: _Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp_size,
        "max_position_embeddings": shape.context_length,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.is_tied,
        "transformers_version": _WRITTEN_FOR,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _convert(tensor: ReaderTensor, shape: _Shape) -> tuple[str, NDArray[np.float32]]:
    """The Hugging Face name and float32 value of one tensor."""
    value = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if tensor.name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[tensor.name], value
    match = _BLOCK_TENSOR.fullmatch(tensor.name)
    if match is None or match[2] not in _BLOCK_NAMES:
        raise Unsupported(f"the GGUF has a tensor {tensor.name!r}, which a plain llama model does not have")
    if match[2] == "attn_q":
        value = _unpermute(value, shape.num_heads)
    elif match[2] == "attn_k":
        value = _unpermute(value, shape.num_kv_heads)
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight", value


def _unpermute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows [H*K, D] from GGUF's order (rotary pairs adjacent) to Hugging Face's (first half, second half of each head)."""
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows, columns))


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
