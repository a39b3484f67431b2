"""Datums of xorl clients, as the engine gets them: shifted, masked, aligned, or refused by field and index."""

import json
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest

from gradstream.api.training_data import to_payload
from gradstream.api.xorl.data import ForwardInput, training_data
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import GradstreamError, InvalidRequest, PayloadTooLarge, Unsupported
from gradstream.shared.wire import IGNORE, ForwardBackward

TOKENS = [11, 12, 13, 14, 15]
LABELS = [IGNORE, IGNORE, 13, 14, 15]


def datum(tokens: Any = TOKENS, **inputs: Any) -> dict[str, Any]:
    model_input = tokens if isinstance(tokens, dict) else {"input_ids": tokens}
    return {"model_input": model_input, "loss_fn_inputs": inputs}


def tensor(values: list[Any], dtype: str = "float32", shape: list[int] | None = None) -> dict[str, Any]:
    return {"data": values, "dtype": dtype, "shape": shape}


def payload(card: EngineCard, *datums: dict[str, Any], **fields: Any) -> ForwardBackward:
    body = msgspec.json.decode(json.dumps({"data": datums, **fields}), type=ForwardInput)
    return to_payload(training_data(body, card, backward=True, max_datums=4), card)


def refusal(
    card: EngineCard, *datums: dict[str, Any], kind: type[GradstreamError] = InvalidRequest, **fields: Any
) -> str:
    with pytest.raises(kind) as error:
        payload(card, *datums, **fields)
    return error.value.message


def column(found: ForwardBackward, name: str, index: int = 0) -> list[Any]:
    source = found.tokens if name == "tokens" else found.inputs[name]
    return source.arrays()[index].tolist()


def test_labels_are_shifted_and_ignored_ones_stay_ignored(card):
    found = payload(card, datum(labels=LABELS))
    assert column(found, "tokens") == TOKENS[:-1]
    assert column(found, "target_tokens") == [IGNORE, 13, 14, 15]
    assert found.loss_fn == "causallm_loss"


def test_target_tokens_are_taken_as_they_are(card):
    found = payload(card, datum(target_tokens=[12, 13, 14, 15, 16]))
    assert column(found, "tokens") == TOKENS
    assert column(found, "target_tokens") == [12, 13, 14, 15, 16]


def test_target_tokens_win_over_labels(card):
    found = payload(card, datum(labels=LABELS, target_tokens=[1, 2, 3, 4, 5]))
    assert column(found, "target_tokens") == [1, 2, 3, 4, 5]


RL = {"logprobs": [0.0, -1.0, -2.0, -3.0, -4.0], "advantages": [0.0, 0.1, 0.2, 0.3, 0.4]}


@pytest.mark.parametrize(
    ("loss_fn", "extra"),
    [
        ("importance_sampling", {}),
        ("policy_loss", {"rollout_logprobs": [0.0, -1.5, -2.5, -3.5, -4.5]}),
        ("drgrpo", {"ref_logprobs": [0.0, -1.5, -2.5, -3.5, -4.5]}),
        ("cispo", {}),
    ],
)
def test_every_field_is_shifted_with_the_labels(card, loss_fn, extra):
    fields = {**RL, **extra}
    found = payload(card, datum(labels=TOKENS, **fields), loss_fn=loss_fn)
    for name, values in fields.items():
        assert column(found, name) == pytest.approx(values[1:]), name


def test_no_field_is_shifted_with_target_tokens(card):
    found = payload(card, datum(target_tokens=TOKENS, **RL), loss_fn="importance_sampling")
    for name, values in RL.items():
        assert column(found, name) == pytest.approx(values), name


@pytest.mark.parametrize(
    "tokens",
    [
        {"input_ids": TOKENS},
        {"input_ids": tensor(TOKENS, "int64", [5])},
        {"chunks": [{"tokens": TOKENS[:2]}, {"type": "encoded_text", "tokens": TOKENS[2:]}]},
        {"input_ids": TOKENS, "position_ids": [0, 1, 2, 3, 4], "attention_mask": [1, 1, 1, 1, 1]},
    ],
    ids=["input_ids", "tensor", "chunks", "plain extras"],
)
def test_tokens_come_in_every_spelling(card, tokens):
    assert payload(card, datum(tokens, labels=LABELS)) == payload(card, datum(labels=LABELS))


@pytest.mark.parametrize(
    "labels",
    [
        tensor(LABELS, "float32", [5]),
        tensor([float(label) for label in LABELS], "float32", [5]),
        tensor(LABELS, "int64"),
        [float(label) for label in LABELS],
    ],
    ids=["whole numbers called float32", "floats", "without shape", "plain floats"],
)
def test_labels_come_in_every_spelling(card, labels):
    assert payload(card, datum(labels=labels)) == payload(card, datum(labels=LABELS))


def test_flat_data_is_nested_by_its_shape(card):
    targets, weights = list(range(10)), [0.5, 1.5] * 5
    flat = datum(target_tokens=tensor(targets, "int64", [5, 2]), weights=tensor(weights, "float32", [5, 2]))
    nested = datum(target_tokens=np.reshape(targets, (5, 2)).tolist(), weights=np.reshape(weights, (5, 2)).tolist())
    found = payload(card, flat, loss_fn="cross_entropy")
    assert found == payload(card, nested, loss_fn="cross_entropy")
    assert column(found, "target_tokens") == np.reshape(targets, (5, 2)).tolist()


def test_a_weight_of_0_is_no_target_and_other_weights_stay(card):
    found = payload(card, datum(labels=TOKENS, weights=[9, 0, 0.5, -1, 2]))
    assert column(found, "target_tokens") == [IGNORE, 13, 14, 15]
    assert column(found, "weights") == [0.0, 0.5, -1.0, 2.0]


def test_weights_of_several_targets_ignore_a_token_only_when_all_are_0(card):
    targets = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    weights = [[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]]
    found = payload(card, datum(target_tokens=targets, weights=weights), loss_fn="cross_entropy")
    assert column(found, "target_tokens") == [[IGNORE, IGNORE], *targets[1:]]


def test_a_loss_without_weights_takes_those_that_switch(card):
    found = payload(card, datum(target_tokens=TOKENS, weights=[0, 1, 1, 0, 1], **RL), loss_fn="policy_loss")
    assert column(found, "target_tokens") == [IGNORE, 12, 13, IGNORE, 15]
    assert "weights" not in found.inputs


def test_a_token_of_advantage_0_counts_unless_asked_otherwise(card):
    one = datum(target_tokens=TOKENS, **RL)
    assert column(payload(card, one, loss_fn="importance_sampling"), "target_tokens") == TOKENS
    found = payload(card, one, loss_fn="importance_sampling", loss_fn_params={"zero_advantage_is_ignored": True})
    assert column(found, "target_tokens") == [IGNORE, *TOKENS[1:]]
    assert found.loss_config == {}


def test_fields_of_other_losses_are_left_out(card):
    found = payload(card, datum(target_tokens=TOKENS, **RL), loss_fn="per_token_ce")
    assert sorted(found.inputs) == ["target_tokens"]


def test_old_logprobs_are_the_logprobs(card):
    fields = {"old_logprobs": RL["logprobs"], "advantages": RL["advantages"]}
    found = payload(card, datum(target_tokens=TOKENS, **fields), loss_fn="drgrpo")
    assert column(found, "logprobs") == RL["logprobs"]


@pytest.mark.parametrize("field", ["loss_fn_params", "loss_fn_config"])
def test_parameters_have_two_names_and_booleans_are_numbers(card, field):
    one = datum(target_tokens=TOKENS, rollout_logprobs=RL["logprobs"], **RL)
    params = {"eps_clip": 0.3, "use_tis": True, "eps_clip_c": None, "return_per_token": True, "compute_kl_stats": True}
    assert payload(card, one, loss_fn="policy_loss", **{field: params}).loss_config == {"eps_clip": 0.3, "use_tis": 1.0}


def test_the_documents_own_example_of_importance_sampling_is_taken(card):
    found = payload(
        card, datum(target_tokens=TOKENS, **RL), loss_fn="importance_sampling", loss_fn_params={"eps_clip": 0.2}
    )
    assert found.loss_config == {}


def test_datums_of_different_lengths_keep_their_order(card):
    found = payload(card, datum([1, 2], labels=[1, 2]), datum([3, 4, 5], labels=[3, 4, 5]))
    assert [column(found, "tokens", index) for index in range(2)] == [[1], [3, 4]]
    assert [column(found, "target_tokens", index) for index in range(2)] == [[2], [4, 5]]


GOOD = datum(labels=LABELS)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels of another length": (
        datum(labels=LABELS[1:]),
        "data[1].loss_fn_inputs.labels: 4 values, but model_input has 5",
    ),
    "a field that is shifted already": (
        datum(labels=LABELS, advantages=[1.0] * 4),
        "data[1].loss_fn_inputs.advantages: 4 values, but model_input has 5 tokens; with labels every field",
    ),
    "no targets": (datum(), "data[1].loss_fn_inputs.target_tokens: missing"),
    "one token with labels": (datum([1], labels=[1]), "data[1].model_input: 1 tokens; with labels a datum needs two"),
    "no tokens": (datum([], target_tokens=[]), "data[1].model_input: has no tokens"),
    "neither input_ids nor chunks": (datum({}, labels=LABELS), "data[1].model_input: send the tokens as input_ids"),
    "both": (datum({"input_ids": [1], "chunks": []}, labels=[1]), "data[1].model_input: send the tokens as input_ids"),
    "nested tokens": (datum({"input_ids": tensor(TOKENS, shape=[5, 1])}, labels=LABELS), "shape [5, 1]; one datum is"),
    "a token beyond the vocabulary": (
        datum([1000, 1], labels=[1, 2]),
        "data[1].model_input[0]: token id 1000 is outside the vocabulary",
    ),
    "a label beyond the vocabulary": (datum([1, 2], labels=[1, 1000]), "token id 1000 is outside the vocabulary"),
    "a negative label that is not -100": (datum([1, 2], labels=[1, -1]), "token id -1 is outside the vocabulary"),
    "a fraction of a label": (datum([1, 2, 3], labels=[1, 1.5, 2]), "data[1].loss_fn_inputs.target_tokens[0]: 1.5"),
    "ragged lists": (datum(labels=[[1], [1, 2]]), "data[1].loss_fn_inputs.labels: its lists are of different lengths"),
    "a null": (datum(labels=[1, None, 2, 3, 4]), "data[1].loss_fn_inputs.labels: holds None"),
    "text": (datum(labels=[1, "two", 2, 3, 4]), "data[1].loss_fn_inputs.labels: holds"),
    "a huge number": (datum(labels=[1, 2**70, 2, 3, 4]), "data[1].loss_fn_inputs.labels: holds 118059"),
    "a shape that does not fit": (datum(labels=tensor(LABELS, shape=[2, 2])), "5 values do not fill the shape [2, 2]"),
    "an unknown dtype": (datum(labels=tensor(LABELS, "complex64")), "labels.dtype: 'complex64' is not one of"),
    "an unknown field": (
        datum(labels=LABELS, rewards=[1.0] * 5),
        "data[1].loss_fn_inputs: no loss here reads 'rewards'",
    ),
    "two names of one field": (
        datum(target_tokens=TOKENS, logprobs=[0.0] * 5, old_logprobs=[0.0] * 5),
        "old_logprobs: it means the same as logprobs",
    ),
    "weights of another length": (datum(labels=LABELS, weights=[1.0] * 4), "data[1].loss_fn_inputs.weights: 4 values"),
    "too long for a row": (
        datum(list(range(65)), target_tokens=list(range(65))),
        "data[1].model_input: 65 tokens are more than the 64 of a packed row (sample_packing_sequence_len",
    ),
    "some of a token's targets ignored": (
        datum(target_tokens=[[1, 2]] * 3 + [[IGNORE, 2], [1, 2]]),
        "data[1].loss_fn_inputs.target_tokens[3]: some of its targets are -100",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_datum_is_refused_by_index_and_field(card, case):
    wrong, message = REFUSED[case]
    first = datum(target_tokens=[[1, 2]] * 5) if "some of" in case else GOOD
    assert message in refusal(card, first, wrong, loss_fn="cross_entropy")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"loss_fn": "dpo"}, InvalidRequest, "loss_fn: 'dpo' is not offered here"),
        ({"loss_fn_params": {"eps_clip": 0.1}}, InvalidRequest, "loss_fn_params: causallm_loss has no eps_clip"),
        ({"loss_fn_config": {"beta": 1}}, InvalidRequest, "loss_fn_config: causallm_loss has no beta"),
        ({"loss_fn_params": {}, "loss_fn_config": {}}, InvalidRequest, "they mean the same"),
        ({"loss_fn_params": {"logprob_temperature": 0.7}}, Unsupported, "logprob_temperature: 0.7 is not offered"),
        ({"loss_fn_params": {"compute_ref_logprobs": True}}, Unsupported, "compute_ref_logprobs"),
        ({"loss_fn_params": {"zero_advantage_is_ignored": 1}}, InvalidRequest, "neither true nor false"),
        ({"routed_experts": [[[0]]]}, Unsupported, "routed experts"),
    ],
)
def test_a_wrong_loss_or_parameter_is_refused(card, fields, kind, message):
    assert message in refusal(card, GOOD, kind=kind, **fields)


@pytest.mark.parametrize(
    ("model_input", "message"),
    [
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "attention_mask: it can only be 1 for every token here"),
        ({"input_ids": [1, 2], "position_ids": [1, 2]}, "position_ids: it can only be 0, 1, 2"),
        ({"chunks": [{"type": "image", "data": "x"}]}, "chunks[0]: image chunks are not supported"),
    ],
)
def test_what_this_model_cannot_read_is_refused_with_the_reason(card, model_input, message):
    assert message in refusal(card, datum(model_input, labels=[1, 2]), kind=Unsupported)


def test_a_policy_loss_takes_no_fractional_weights(card):
    one = datum(target_tokens=TOKENS, weights=[1, 1, 0.5, 1, 1], **RL)
    assert "weights[2]: 0.5; policy_loss only takes weights 0 and 1" in refusal(card, one, loss_fn="policy_loss")


@pytest.mark.parametrize("one", [datum(labels=[IGNORE] * 5), datum(labels=TOKENS, weights=[0] * 5)])
def test_a_request_without_any_target_is_refused(card, one):
    assert "there is no token to learn from" in refusal(card, one, one)


def test_a_datum_without_targets_among_others_is_taken(card):
    found = payload(card, datum(labels=[IGNORE] * 5), GOOD)
    assert column(found, "target_tokens", 0) == [IGNORE] * 4


def test_too_many_datums_are_refused(card):
    assert "5 datums; one call takes at most 4" in refusal(card, *[GOOD] * 5, kind=PayloadTooLarge)


def test_no_datums_are_refused(card):
    assert "there are no datums" in refusal(card)


def test_routing_within_a_datum_is_refused(card):
    assert "routed experts" in refusal(card, {**GOOD, "routed_experts": [[[0]]]}, kind=Unsupported)
    assert payload(card, {**GOOD, "routed_experts": None}) == payload(card, GOOD)


@pytest.mark.parametrize("value", [1e39, 10**39, 10**400, -(10**400)])
def test_a_parameter_that_no_float32_holds_is_refused_by_name(card, value):
    message = refusal(card, datum(target_tokens=TOKENS), loss_fn="policy_loss", loss_fn_params={"eps_clip_high": value})
    assert "loss_fn_params.eps_clip_high" in message or "loss_fn_config.eps_clip_high" in message


@pytest.mark.parametrize("shape", [lambda values: values, tensor, lambda values: [[1], values]])
@pytest.mark.parametrize("first", ["a" * 20000, None, {"a": 1}])
def test_what_is_no_number_is_refused_before_an_array_is_made_of_it(card, first, shape):
    wrong = datum(target_tokens=shape([first, *["b"] * 6000]))
    tracemalloc.start()
    message = refusal(card, wrong)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"holds {first!r}"[:40] in message
    assert peak_bytes < 20e6


@pytest.mark.parametrize(
    "shaped",
    [
        tensor([1], shape=[1] * 65),
        tensor([], shape=[0, 10**30]),
        tensor([1], shape=[10**30, 0]),
        tensor([1, 2], shape=[-1, -2]),
    ],
    ids=repr,
)
def test_a_shape_that_no_array_has_is_refused(card, shaped):
    assert "target_tokens" in refusal(card, datum(target_tokens=shaped))


def test_lists_nested_deeper_than_arrays_are_refused(card):
    nested: Any = 1
    for _ in range(70):
        nested = [nested]
    assert "target_tokens" in refusal(card, datum(target_tokens=nested))
