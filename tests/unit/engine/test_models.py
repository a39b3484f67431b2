"""Which models are loaded, and with which words the others are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.engine_builders import DENSE, open_engine
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
)

from gradstream.engine.adapters.layout import SiteKind
from gradstream.engine.models.build import load_base, seam
from gradstream.shared.errors import Unsupported

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_supported_families_load_frozen_with_the_head_as_the_last_site(
    family: str, model_path: Callable[[str], Path]
) -> None:
    base = load_base(model_path(family), device=CPU, dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in base.causal_lm.parameters())
    assert [site.index for site in base.sites] == list(range(len(base.sites)))
    assert base.head_site.kind is SiteKind.HEAD
    parameters = dict(base.causal_lm.named_parameters(remove_duplicate=False))
    for site in base.sites:
        weight = parameters.get(f"{site.name}.weight", parameters.get(site.name))
        assert weight is not None, site.name
        experts = (site.num_experts,) if site.num_experts else ()
        assert tuple(weight.shape) == (*experts, site.out_features, site.in_features)


def test_the_packed_pass_equals_transformers_own_logits(llama: Path) -> None:
    base = load_base(llama, device=CPU, dtype=torch.float32)
    truth = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 4, 9, 1]
    parts = [torch.randint(2048, (length,), generator=generator) for length in lengths]
    context = base.packed(lengths)
    with torch.no_grad():
        hidden = base.hidden(torch.cat(parts), context.segments.positions, attention=context, adapters=None)
        got = hidden @ base.head_weight.t()
        want = torch.cat([truth(input_ids=part[None]).logits[0] for part in parts])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "soft-capping": (Gemma2Config(**SMALL, head_dim=8), "softcapping"),
    "sliding window": (MistralConfig(**SMALL, sliding_window=8), "sliding window of 8"),
    "no rotary positions": (
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        ),
        "rotary",
    ),
    "scaled logits": (GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling=8.0"),
    "fused projections": (Phi3Config(**SMALL), "q_proj"),
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_family_that_computes_something_else_is_refused(config: PretrainedConfig, words: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=words):
        load_base(tmp_path, device=CPU, dtype=torch.float32)


def test_a_model_whose_forward_we_do_not_reproduce_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DENSE), attn_implementation="sdpa").eval()
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = scaled
    with pytest.raises(Unsupported, match="gives other logits"):
        seam(model, digest="")


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"holds no config\.json"):
        load_base(tmp_path, device=CPU, dtype=torch.float32)


def test_the_digest_tells_weights_apart(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(DENSE, copy)
    first = load_base(copy, device=CPU, dtype=torch.float32).facts.digest
    assert first == load_base(DENSE, device=CPU, dtype=torch.float32).facts.digest
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_base(copy, device=CPU, dtype=torch.float32).facts.digest != first


def test_the_card_says_what_the_engine_offers() -> None:
    engine = open_engine(model_aliases=("other/name",), max_context_tokens=100)
    card = engine.card(epoch=3)
    assert card.names() == ["tiny", "other/name"]
    assert card.architecture == "Qwen3ForCausalLM"
    assert (card.vocab_size, card.max_context_tokens, card.max_lora_rank, card.epoch) == (2048, 100, 64, 3)
    assert "cross_entropy" in [loss.name for loss in card.losses]
    assert "threads=1" in card.fingerprint


def test_the_context_never_exceeds_the_models_own() -> None:
    limit = json.loads((DENSE / "config.json").read_text())["max_position_embeddings"]
    assert open_engine(max_context_tokens=10 * limit).card(epoch=1).max_context_tokens == limit


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DENSE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(Unsupported, match=r"cannot be read as a Hugging Face model: .*model\.safetensors"):
        load_base(tmp_path, device=CPU, dtype=torch.float32)


def test_a_cut_weight_file_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DENSE, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Unsupported, match="cannot be read as a Hugging Face model"):
        load_base(tmp_path, device=CPU, dtype=torch.float32)


def test_weights_that_the_files_lack_are_not_left_at_random_values(tmp_path: Path) -> None:
    shutil.copytree(DENSE, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(Unsupported, match=r"lacks 1 weights of its model, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(tmp_path, device=CPU, dtype=torch.float32)
