from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gradstream.engine.sampler.stops import stop_rule
from gradstream.engine.sampler.text import open_decoder
from gradstream.shared.errors import Unsupported
from gradstream.shared.wire import SamplingParams

MODEL_DIR = Path("tests/models/tiny-qwen3-shakespeare")
EOS = 2
TOKENIZER = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
DECODER = open_decoder(MODEL_DIR)


def num_kept(tokens, *, ids=None, texts=None):
    """How many of the tokens are returned when they are generated one after the other."""
    params = SamplingParams(max_tokens=1000, stop_token_ids=ids, stop_texts=texts)
    rule = stop_rule(params, eos_token_ids=frozenset({EOS}), decoder=DECODER)
    for end in range(1, len(tokens) + 1):
        if rule.ends(tokens[:end]):
            return end
    return len(tokens)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, 3),
        ({"ids": []}, 6),
        ({"texts": []}, 6),
        ({"ids": [], "texts": []}, 6),
        ({"ids": [20]}, 2),
        ({"ids": [40, 50]}, 5),
        ({"ids": [77]}, 6),
        ({"ids": [EOS]}, 3),
    ],
    ids=["nothing", "no ids", "no texts", "neither", "an id", "two ids", "an id that never comes", "EOS itself"],
)
def test_ids_and_eos_end_a_sequence_as_the_table_says(given, kept):
    assert num_kept([10, 20, EOS, 30, 40, 60], **given) == kept


@pytest.mark.parametrize(
    ("text", "stop", "kept_text"),
    [
        ("Speak to the mariners: fall to it.", "mariners", "Speak to the mariners"),
        ("one\ntwo\n\nUser: three", "\n\nUser:", "one\ntwo\n\nUser:"),
        ("a b c", "z", "a b c"),
        ("caf\u00e9 \u4f60\u597d now", "\u597d", "caf\u00e9 \u4f60\u597d"),
    ],
    ids=["a word", "many tokens", "absent", "a character of several tokens"],
)
def test_a_stop_text_is_inside_the_returned_tokens(text, stop, kept_text):
    tokens = TOKENIZER.encode(text).ids
    returned = DECODER.text(tokens[: num_kept(tokens, texts=[stop])])
    assert returned.startswith(kept_text)
    assert len(returned) - len(kept_text) < max(len(DECODER.text([token])) for token in tokens)


def test_a_stop_text_ends_at_the_first_token_that_completes_it():
    tokens = TOKENIZER.encode("Good, and good again, and good once more").ids
    kept = num_kept(tokens, texts=["good"])
    assert "good" in DECODER.text(tokens[:kept])
    assert "good" not in DECODER.text(tokens[: kept - 1])


def test_eos_still_ends_a_sequence_when_only_texts_are_given():
    assert num_kept([10, EOS, 30], texts=["never"]) == 2


def test_ids_and_texts_together_both_end_a_sequence():
    tokens = [*TOKENIZER.encode("hello there").ids, 50, 60]
    assert num_kept(tokens, ids=[50], texts=["zzz"]) == len(tokens) - 1
    assert num_kept(tokens, ids=[50], texts=["hello"]) < len(tokens) - 1


def test_special_tokens_can_be_stop_texts():
    assert num_kept([10, 1, 30], texts=["<|im_start|>"]) == 2


def test_stop_texts_without_a_tokenizer_are_refused(tmp_path):
    assert open_decoder(tmp_path) is None
    params = SamplingParams(max_tokens=4, stop_texts=["x"])
    with pytest.raises(Unsupported, match="give token ids"):
        stop_rule(params, eos_token_ids=frozenset({EOS}), decoder=None)
