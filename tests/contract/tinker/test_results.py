"""Outcomes rendered here are read by the tinker SDK's own decoders to the same values."""

import json
import math

import msgspec
import numpy as np
import pytest
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from gradstream.api.tinker.results import render
from gradstream.shared.columns import Column
from gradstream.shared.ids import ModelId, SamplerId
from gradstream.shared.wire import (
    CreateModelDone,
    Done,
    ForwardBackwardDone,
    LoadWeightsDone,
    OptimStepDone,
    RestoreSnapshotDone,
    SampleDone,
    SaveForSamplerDone,
    SaveWeightsDone,
    Sequence,
    TargetLogprobs,
    TopK,
    UnloadModelDone,
)

ARRAYS = [np.array([-1.0, -2.0, -3.5], dtype=np.float32), np.array([-0.25], dtype=np.float32)]
FORWARD_BACKWARD = ForwardBackwardDone(
    outputs={"logprobs": Column.of(list(ARRAYS), dtype="float32")}, metrics={"loss:sum": 6.75}
)
TOPK = TopK(
    token_ids=np.array([[0, 0], [4, 5]], dtype="<i4").tobytes(),
    logprobs=np.array([[-99999.0, -99999.0], [-0.5, -1.5]], dtype="<f4").tobytes(),
    k=2,
    length=2,
)
SAMPLE = SampleDone(
    sequences=[
        Sequence(
            stop_reason="stop",
            tokens=np.array([7, 8], dtype="<i4").tobytes(),
            logprobs=np.array([-0.5, -0.25], dtype="<f4").tobytes(),
        )
    ],
    prompt_logprobs=np.array([np.nan, -1.5], dtype="<f4").tobytes(),
    topk_prompt=TOPK,
)


def as_json(done: Done) -> dict:
    rendered = render(done, accepts_protobuf=False)
    assert rendered.media_type == "application/json"
    return json.loads(rendered.content)


def test_a_forward_backward_result_is_what_the_sdk_reads() -> None:
    rendered = render(FORWARD_BACKWARD, accepts_protobuf=True)
    assert rendered.media_type == "application/x-protobuf"
    output = deserialize_forward_backward_output(rendered.content)
    assert output.metrics == {"loss:sum": 6.75}
    assert [o["logprobs"].data for o in output.loss_fn_outputs] == [a.tolist() for a in ARRAYS]
    assert [o["logprobs"].shape for o in output.loss_fn_outputs] == [[3], [1]]


def test_columns_of_every_dtype_and_a_trailing_shape_reach_the_sdk() -> None:
    table = np.arange(6, dtype=np.float64).reshape(3, 2)
    done = ForwardBackwardDone(
        outputs={
            "table": Column.of([table], dtype="float64", trailing=(2,)),
            "ids": Column.of([np.array([1, 2, 3])], dtype="int64"),
            "small": Column.of([np.array([1, 2, 3])], dtype="int32"),
        },
        metrics={},
    )
    output = deserialize_forward_backward_output(render(done, accepts_protobuf=True).content).loss_fn_outputs[0]
    assert output["table"].shape == [3, 2]
    assert output["table"].data == table.ravel().tolist()
    assert output["ids"].data == output["small"].data == [1, 2, 3]


def test_a_sample_result_is_what_the_sdk_reads() -> None:
    response = deserialize_sample_response(render(SAMPLE, accepts_protobuf=True).content)
    assert response.sequences[0].stop_reason == "stop"
    assert list(response.sequences[0].tokens) == [7, 8]
    assert list(response.sequences[0].logprobs or []) == [-0.5, -0.25]
    assert response.prompt_logprobs == [None, -1.5]
    assert response.topk_prompt_logprobs == [None, [(4, -0.5), (5, -1.5)]]


def test_json_results_have_the_fields_of_the_older_sdks() -> None:
    assert as_json(FORWARD_BACKWARD)["loss_fn_outputs"][0] == {
        "logprobs": {"data": [-1.0, -2.0, -3.5], "dtype": "float32", "shape": [3]}
    }
    sample = as_json(SAMPLE)
    assert sample["sequences"] == [{"stop_reason": "stop", "tokens": [7, 8], "logprobs": [-0.5, -0.25]}]
    assert sample["prompt_logprobs"] == [None, -1.5]
    assert sample["topk_prompt_logprobs"] == [None, [[4, -0.5], [5, -1.5]]]


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (CreateModelDone(model_id=ModelId("m")), {"type": "create_model", "model_id": "m"}),
        (UnloadModelDone(model_id=ModelId("m")), {"type": "unload_model", "model_id": "m"}),
        (OptimStepDone(metrics={"a": 1.0}), {"metrics": {"a": 1.0}}),
        (SaveWeightsDone(path="p"), {"type": "save_weights", "path": "p"}),
        (LoadWeightsDone(path="p", model_id=ModelId("m")), {"type": "load_weights", "path": "p", "model_id": "m"}),
        (
            SaveForSamplerDone(path="p"),
            {"type": "save_weights_for_sampler", "path": "p", "sampling_session_id": None},
        ),
        (
            SaveForSamplerDone(sampler_id=SamplerId("s")),
            {"type": "save_weights_for_sampler", "path": None, "sampling_session_id": "s"},
        ),
    ],
)
def test_other_results_are_json_whatever_the_client_accepts(done: Done, expected: dict) -> None:
    rendered = render(done, accepts_protobuf=True)
    assert rendered.media_type == "application/json"
    assert json.loads(rendered.content) == expected


def test_a_metric_that_is_not_finite_keeps_its_value() -> None:
    assert math.isnan(as_json(OptimStepDone(metrics={"grad_norm": math.nan}))["metrics"]["grad_norm"])
    infinite = ForwardBackwardDone(outputs={"logprobs": Column.of([np.array([-np.inf])], dtype="float32")}, metrics={})
    assert as_json(infinite)["loss_fn_outputs"][0]["logprobs"]["data"] == [-math.inf]


TARGETS = np.array([-1.5, 0.0, -2.5], dtype="<f4")
ASKED_MORE = msgspec.structs.replace(
    SAMPLE,
    target_prompt=TargetLogprobs(logprobs=TARGETS.tobytes(), shape=(1, 3)),
    alt_tokens=TopK(
        token_ids=np.array([8, 9], dtype="<i4").tobytes(),
        logprobs=np.array([-0.5, -1.0], dtype="<f4").tobytes(),
        k=2,
        length=1,
    ),
)
SPARSE = TargetLogprobs(
    logprobs=TARGETS.tobytes(),
    shape=(2, 9),
    crow_indices=np.array([0, 1, 3], dtype="<i8").tobytes(),
    col_indices=np.array([8, 0, 1], dtype="<i8").tobytes(),
)


def test_target_logprobs_keep_the_layout_of_the_request_and_alternatives_their_shape() -> None:
    response = deserialize_sample_response(render(ASKED_MORE, accepts_protobuf=True).content)
    dense, drawn = response.target_prompt_logprobs, response.prompt_alt_tokens
    assert dense is not None
    assert drawn is not None
    assert (list(dense.data), dense.dtype, dense.shape) == ([-1.5, 0.0, -2.5], "float32", [1, 3])
    assert dense.sparse_crow_indices is None
    assert (list(drawn.tokens.data), drawn.tokens.dtype, drawn.tokens.shape) == ([8, 9], "int64", [1, 2])
    assert (list(drawn.logprobs.data), drawn.logprobs.dtype, drawn.logprobs.shape) == ([-0.5, -1.0], "float32", [1, 2])
    done = msgspec.structs.replace(SAMPLE, target_prompt=SPARSE)
    sparse = deserialize_sample_response(render(done, accepts_protobuf=True).content).target_prompt_logprobs
    assert sparse is not None
    assert (sparse.shape, sparse.sparse_crow_indices, sparse.sparse_col_indices) == ([2, 9], [0, 1, 3], [8, 0, 1])
    assert list(sparse.data) == [-1.5, 0.0, -2.5]


def test_json_clients_get_target_logprobs_and_alternatives_as_tensors() -> None:
    result = as_json(ASKED_MORE)
    assert result["target_prompt_logprobs"] == {"data": [-1.5, 0.0, -2.5], "dtype": "float32", "shape": [1, 3]}
    assert result["prompt_alt_tokens"] == {
        "tokens": {"data": [8, 9], "dtype": "int64", "shape": [1, 2]},
        "logprobs": {"data": [-0.5, -1.0], "dtype": "float32", "shape": [1, 2]},
    }
    sparse = as_json(msgspec.structs.replace(SAMPLE, target_prompt=SPARSE))["target_prompt_logprobs"]
    assert (sparse["sparse_crow_indices"], sparse["sparse_col_indices"]) == ([0, 1, 3], [8, 0, 1])


def test_the_gangs_own_job_is_never_rendered_for_a_client():
    with pytest.raises(TypeError, match="the gang's own job"):
        render(RestoreSnapshotDone(models=[]), accepts_protobuf=False)
