"""The body of asample becomes a payload, or an error that names the field."""

import msgspec
import pytest
from tests.support.cards import CONTEXT_TOKENS, UNIFORM_CARD, VOCAB_SIZE

from gradstream.api.config import ApiConfig
from gradstream.api.tinker.sampling_body import parse_sample, sample_payload
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.wire import Sample


def body(**fields: object) -> dict:
    prompt = {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]}
    return {"prompt": prompt, "sampling_params": {"max_tokens": 4}, "type": "sample", **fields}


def payload(fields: dict) -> Sample:
    parsed = parse_sample(msgspec.json.encode(fields))
    return sample_payload(parsed, path=None, card=UNIFORM_CARD, config=ApiConfig())


@pytest.mark.parametrize(
    ("stop", "token_ids", "texts"),
    [
        (None, None, None),
        ("END", None, ["END"]),
        (["a", "b"], None, ["a", "b"]),
        ([7, 8], [7, 8], None),
        ([], [], []),
    ],
)
def test_each_form_of_stop_has_its_meaning(stop: object, token_ids: object, texts: object) -> None:
    params = payload(body(sampling_params={"max_tokens": 1, "stop": stop})).params
    assert (params.stop_token_ids, params.stop_texts) == (token_ids, texts)


def test_max_tokens_defaults_to_the_room_after_the_prompt() -> None:
    assert payload(body(sampling_params={})).params.max_tokens == CONTEXT_TOKENS - 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples: 0 is not between 1 and"),
        ({"num_samples": 10**6}, "num_samples: 1000000"),
        ({"prompt": {"chunks": []}}, "prompt: has no tokens"),
        (
            {"prompt": {"chunks": [{"tokens": [VOCAB_SIZE], "type": "encoded_text"}]}},
            r"prompt.tokens\[0\]: token id 1000",
        ),
        ({"prompt": {"chunks": [{"tokens": [1] * CONTEXT_TOKENS, "type": "encoded_text"}]}}, "leave no room"),
        (
            {"sampling_params": {"max_tokens": CONTEXT_TOKENS}},
            "sampling_params.max_tokens: 128 is not between 1 and 125",
        ),
        ({"sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens: 0"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature: -1"),
        ({"sampling_params": {"temperature": 1e39}}, r"sampling_params.temperature: 1e\+39 is beyond float32"),
        ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p: 0"),
        ({"sampling_params": {"top_k": 0}}, "sampling_params.top_k: 0"),
        ({"sampling_params": {"seed": 2**64}}, "sampling_params.seed"),
        ({"sampling_params": {"stop": ["a", 1]}}, "mixes texts and token ids"),
        ({"sampling_params": {"stop": [""]}}, "a text must have"),
        ({"sampling_params": {"stop": [VOCAB_SIZE]}}, "stop: token id 1000 is outside"),
        ({"sampling_params": {"best_of": 1}}, "unknown field `best_of`"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs: -1"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k: -1"),
        ({"prompt_alt_tokens_k": 10**6}, "prompt_alt_tokens_k: 1000000"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n: it is about prompt_logprobs"),
        ({"prompt_logprobs_last_n": 0, "prompt_logprobs": True}, "prompt_logprobs_last_n: 0"),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, "prompt_logprobs_last_n: 3 is not between 1 and 2"),
        ({"record_stability_info": True}, "record_stability_info: .*stable_reinforce"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises((InvalidRequest, Unsupported), match=message):
        payload(body(**fields))


DENSE = {"data": [1, 2, -1, 4], "dtype": "int64", "shape": [2, 2]}
SPARSE = {
    "data": [5, 6, 7],
    "dtype": "int64",
    "shape": [2, 9],
    "sparse_crow_indices": [0, 1, 3],
    "sparse_col_indices": [8, 0, 1],
}


@pytest.mark.parametrize(
    ("tensor", "cells"),
    [(DENSE, [(0, 1), (0, 2), (1, -1), (1, 4)]), (SPARSE, [(0, 5), (1, 6), (1, 7)])],
    ids=["dense", "sparse"],
)
def test_targets_of_either_layout_become_cells_with_their_rows(tensor: dict, cells: list) -> None:
    targets = payload(body(target_prompt_logprobs=tensor)).target_prompt_logprobs
    assert targets is not None
    assert list(zip(targets.rows().tolist(), targets.ids().tolist(), strict=True)) == cells


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({**DENSE, "dtype": "float32"}, "dtype float32"),
        ({**DENSE, "shape": None}, "shape None"),
        ({**DENSE, "shape": [4]}, r"it must be int64 of shape \[2, K\]"),
        ({**DENSE, "shape": [4, 1]}, r"shape \[4, 1\]; it must be \[2, K\]"),
        ({**DENSE, "shape": [2, -2]}, r"shape \[2, -2\]"),
        ({**DENSE, "shape": [2, 3]}, "4 ids do not fill"),
        ({**DENSE, "data": [1, 2, 3, VOCAB_SIZE]}, "token 1000 is outside the vocabulary"),
        ({**DENSE, "data": [1, 2, 3, -2]}, "token -2 is outside the vocabulary"),
        ({**DENSE, "data": [1, 2, 3, 2**40]}, "outside the vocabulary"),
        ({**DENSE, "data": [1, 2, 3, 2**70]}, "does not fit in int64"),
        ({**DENSE, "data": [1, 2, 3, 0.5]}, "holds fractions"),
        ({**DENSE, "sparse_crow_indices": [0, 1, 4]}, "has both"),
        ({**SPARSE, "sparse_col_indices": None}, "has both"),
        ({**SPARSE, "sparse_crow_indices": [0, 3]}, "has 3 sparse_crow_indices and 3 sparse_col_indices"),
        ({**SPARSE, "shape": [2, 2**70]}, "shape"),
        ({**SPARSE, "sparse_col_indices": [0]}, "has 3 sparse_crow_indices and 3 sparse_col_indices"),
        ({**SPARSE, "sparse_crow_indices": [0, 4, 3]}, "must rise from 0 to 3"),
        ({**SPARSE, "sparse_crow_indices": [0, -(2**63), 3]}, "must rise from 0 to 3"),
        ({**SPARSE, "sparse_crow_indices": [1, 1, 3]}, "must rise from 0 to 3"),
        ({**SPARSE, "sparse_col_indices": [0, 1, 9]}, "must be 0 to 8"),
    ],
)
def test_bad_targets_are_refused_by_name(tensor: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match="target_prompt_logprobs.*" + message):
        payload(body(target_prompt_logprobs=tensor))


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    nothing = {"target_prompt_logprobs": None, "prompt_alt_tokens_k": 0, "record_stability_info": False}
    assert payload(body(**nothing)).num_samples == 1


@pytest.mark.parametrize(
    ("fields", "is_taken"),
    [
        ({"num_samples": 1024, "topk_sample_logprobs": 64, "sampling_params": {"max_tokens": 1000}}, False),
        ({"num_samples": 1024, "sampling_params": {"max_tokens": 8100}}, True),
        ({"num_samples": 16, "topk_sample_logprobs": 20, "sampling_params": {"max_tokens": 8100}}, True),
    ],
    ids=["half a gigabyte", "many long samples", "candidates of long samples"],
)
def test_an_answer_that_could_not_be_stored_is_refused_before_it_is_made(fields: dict, is_taken: bool) -> None:
    card = msgspec.structs.replace(UNIFORM_CARD, max_context_tokens=8192)
    parsed = parse_sample(msgspec.json.encode(body(**fields)))
    if is_taken:
        assert sample_payload(parsed, path=None, card=card, config=ApiConfig()).num_samples == fields["num_samples"]
        return
    with pytest.raises(InvalidRequest, match="the answer may take 532480"):
        sample_payload(parsed, path=None, card=card, config=ApiConfig())
