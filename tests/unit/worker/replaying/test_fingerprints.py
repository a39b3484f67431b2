"""What is taken over from a log's fingerprint, and what is named as different."""

from pathlib import Path

import pytest

from gradstream.engine.config import DTypePolicy, EngineConfig, Merging
from gradstream.engine.numerics import learning_facts
from gradstream.worker.replaying.fingerprints import adopted, differences, num_ranks

CONFIG = EngineConfig(model_path=Path("m"), model_name="m", tokenizer_id="m", output_dir=Path("o"))


def test_an_engine_is_set_up_as_the_logs_was():
    made = adopted(CONFIG, "torch=9 threads=16 dtype=bfloat16 lora_alpha=12.5 seed=-7 attention=auto")
    assert (made.torch_threads, made.dtype, made.lora_alpha, made.seed) == (16, DTypePolicy.BFLOAT16, 12.5, -7)


@pytest.mark.parametrize("text", ["", "nonsense", "threads=many dtype=int4 lora_alpha=x seed=1.5 attention=gone"])
def test_what_a_fingerprint_does_not_say_stays_as_configured(text):
    assert adopted(CONFIG, text) == CONFIG


def test_every_difference_is_named_with_both_values():
    assert differences("torch=1 device=cpu-A ranks=1", "torch=2 device=cpu-A seed=3") == [
        "ranks is unknown here and was 1",
        "seed is 3 here and was unknown",
        "torch is 2 here and was 1",
    ]
    assert differences("torch=1", "torch=1") == []


def test_the_ranks_of_a_log_are_read():
    assert [num_ranks(text) for text in ("ranks=4 torch=1", "torch=1", "ranks=x")] == [4, 1, 1]


def test_what_was_trained_is_taken_over():
    made = adopted(CONFIG, "torch=1 dtype=bfloat16 weights=full master=bf16 router=free")
    assert (made.is_lora, made.master_dtype, made.freeze_router) == (False, "bf16", False)
    assert not adopted(CONFIG, "weights=full master=fp32 router=frozen").is_lora
    full = EngineConfig(model_path=Path("m"), model_name="m", tokenizer_id="m", output_dir=Path("o"), is_lora=False)
    assert adopted(full, "torch=1 dtype=float32").is_lora


def test_merges_are_those_of_the_log():
    text = 'torch=1 merging={"interval":7,"resets_optimizer":true,"max_rank":96}'
    made = adopted(CONFIG, text)
    assert made.merging == Merging(interval=7, resets_optimizer=True, max_rank=96)
    assert learning_facts(made) == {"merging": text.partition("merging=")[2]}
    assert adopted(made, "torch=1").merging == Merging()
    assert learning_facts(CONFIG) == {}


def test_default_modules_and_compiled_units_are_those_of_the_log():
    made = adopted(CONFIG, "torch=1 modules=q_proj,v_proj units=Qwen3MLP,Qwen3RMSNorm")
    assert made.lora_target_modules == ("q_proj", "v_proj")
    assert made.memory.basic_modules == ("Qwen3MLP", "Qwen3RMSNorm")
    assert adopted(made, "") == made
    assert adopted(made, "torch=1") == CONFIG
