import json
import stat

import gguf
import numpy as np
import pytest
import torch
from tests.support.gguf_files import TEMPLATE, TOKENS, tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.engine.models.gguf import convert_gguf
from gradstream.shared.errors import InvalidRequest, StorageFailure, Unsupported

TOKENS_1T = torch.tensor([[5, 99, 7, 200, 31, 2, 118, 64, 12]])


@pytest.fixture
def converted(tmp_path):
    def make(model=None, **options):
        write_gguf(model or tiny_llama(), tmp_path / "model.gguf", **options)
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
        return tmp_path / "out"

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS_1T).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_a_float32_file_gives_the_logits_of_the_model_it_was_written_from(converted, tied):
    model = tiny_llama(tied=tied)
    loaded = AutoModelForCausalLM.from_pretrained(converted(model))
    assert loaded.dtype == torch.float32
    assert loaded.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_0", "F16"])
def test_a_quantised_file_gives_the_weights_that_transformers_reads_from_it(converted, tmp_path, name):
    out = converted(weight_type=gguf.GGMLQuantizationType[name])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key].float(), rtol=0, atol=0)


def test_the_config_states_the_numbers_as_they_were_written_and_no_quantisation(converted):
    out = converted()
    config = json.loads((out / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05
    assert config["rope_parameters"]["rope_theta"] == 50_000.0
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.rope_parameters["rope_theta"] == 50_000.0
    assert loaded.generation_config.eos_token_id == 2


def test_digits_are_cut_off_one_by_one_before_the_spaces_are_merged(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted())
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12"))
    assert pieces == ["a", "\u0120\u0120", "1", "2"]


def test_the_gpt2_pre_tokenizer_leaves_digits_together(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted(pre_tokenizer="gpt-2"))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12"))
    assert pieces == ["a", "\u0120", "\u0120", "12"]


def test_special_tokens_and_the_chat_template_come_along(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, return_dict=False)[0] == 1
    assert tokenizer.decode(tokenizer.encode("hello 12\n")) == "hello 12\n"
    assert len(tokenizer) == len(TOKENS)


def test_the_files_can_be_read_by_everyone(converted):
    for path in converted().iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "'qwen2' model; only 'llama'"),
        ({"pre_tokenizer": "tekken"}, "pre-tokenizer is 'tekken'"),
        ({"extra_tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "without rope scaling"),
        ({"extra_tensors": {"blk.0.attn_q.bias": np.ones(8, np.float32)}}, "'blk.0.attn_q.bias'"),
    ],
    ids=["other architecture", "unknown pre-tokenizer", "rope scaling", "unknown tensor"],
)
def test_what_is_no_plain_llama_is_refused_and_leaves_nothing_behind(converted, tmp_path, options, message):
    with pytest.raises(Unsupported, match=message):
        converted(**options)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(InvalidRequest, match="not a readable GGUF file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageFailure, match="no such file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
