"""A finished sample as the tinker wire shows it: protobuf, or JSON for older SDKs."""

from typing import Any

import numpy as np

from gradstream.api.tinker.proto import wire_pb2
from gradstream.shared.wire import SampleDone, TargetLogprobs, TopK

_STOP_REASONS = {"stop": wire_pb2.STOP_REASON_STOP, "length": wire_pb2.STOP_REASON_LENGTH}
# What an empty cell of a top-k table holds on the wire.
_EMPTY_LOGPROB = -99999.0


def sample_proto(done: SampleDone) -> wire_pb2.SampleResponse:
    """What SDKs from 0.18 on ask for."""
    return wire_pb2.SampleResponse(
        sequences=[
            wire_pb2.SampledSequence(
                stop_reason=_STOP_REASONS[sequence.stop_reason],
                tokens=sequence.tokens,
                logprobs=sequence.logprobs,
                topk_sampled_logprobs=None if sequence.topk is None else _topk_proto(sequence.topk),
            )
            for sequence in done.sequences
        ],
        prompt_logprobs=done.prompt_logprobs,
        topk_prompt_logprobs=None if done.topk_prompt is None else _topk_proto(done.topk_prompt),
        target_prompt_logprobs=None if done.target_prompt is None else _targets_proto(done.target_prompt),
        prompt_alt_tokens=None if done.alt_tokens is None else _alternatives_proto(done.alt_tokens),
    )


def _topk_proto(topk: TopK) -> wire_pb2.TopkLogprobs:
    return wire_pb2.TopkLogprobs(token_ids=topk.token_ids, logprobs=topk.logprobs, k=topk.k, length=topk.length)


def _targets_proto(targets: TargetLogprobs) -> wire_pb2.Tensor:
    shape, dtype = list(targets.shape), wire_pb2.DTYPE_FLOAT32
    if targets.crow_indices is None or targets.col_indices is None:
        return wire_pb2.Tensor(dense=targets.logprobs, dtype=dtype, shape=shape)
    csr = wire_pb2.SparseCsr(
        values=targets.logprobs, crow_indices=targets.crow_indices, col_indices=targets.col_indices
    )
    return wire_pb2.Tensor(sparse_csr=csr, dtype=dtype, shape=shape)


def _alternatives_proto(drawn: TopK) -> wire_pb2.PromptAltTokens:
    shape = [drawn.length, drawn.k]
    return wire_pb2.PromptAltTokens(
        tokens=wire_pb2.Tensor(dense=drawn.token_ids, dtype=wire_pb2.DTYPE_INT32, shape=shape),
        logprobs=wire_pb2.Tensor(dense=drawn.logprobs, dtype=wire_pb2.DTYPE_FLOAT32, shape=shape),
    )


# Any: the JSON of results is free-form; the shape is that of SampleResponse of the older SDKs.
def sample_json(done: SampleDone) -> dict[str, Any]:
    """What SDKs before 0.18 read, and any client that accepts JSON alone."""
    result: dict[str, Any] = {"type": "sample", "sequences": []}
    for sequence in done.sequences:
        item: dict[str, Any] = {
            "stop_reason": sequence.stop_reason,
            "tokens": np.frombuffer(sequence.tokens, dtype="<i4").tolist(),
            "logprobs": np.frombuffer(sequence.logprobs, dtype="<f4").tolist(),
        }
        if sequence.topk is not None:
            item["topk_logprobs"] = _json_topk(sequence.topk)
        result["sequences"].append(item)
    if done.prompt_logprobs is not None:
        logprobs = np.frombuffer(done.prompt_logprobs, dtype="<f4")
        result["prompt_logprobs"] = [None if np.isnan(value) else float(value) for value in logprobs]
    if done.topk_prompt is not None:
        result["topk_prompt_logprobs"] = _json_topk(done.topk_prompt)
    if done.target_prompt is not None:
        result["target_prompt_logprobs"] = _json_targets(done.target_prompt)
    if done.alt_tokens is not None:
        result["prompt_alt_tokens"] = _json_alternatives(done.alt_tokens)
    return result


def _json_topk(topk: TopK) -> list[list[tuple[int, float]] | None]:
    """Per position its candidates as (token id, logprob), None where there are none."""
    token_ids = np.frombuffer(topk.token_ids, dtype="<i4").reshape(topk.length, topk.k)
    logprobs = np.frombuffer(topk.logprobs, dtype="<f4").reshape(topk.length, topk.k)
    rows: list[list[tuple[int, float]] | None] = []
    for row_ids, row_logprobs in zip(token_ids.tolist(), logprobs.tolist(), strict=True):
        cells = [cell for cell in zip(row_ids, row_logprobs, strict=True) if cell[1] > _EMPTY_LOGPROB]
        rows.append(cells or None)
    return rows


def _json_targets(targets: TargetLogprobs) -> dict[str, Any]:
    tensor: dict[str, Any] = {
        "data": np.frombuffer(targets.logprobs, dtype="<f4").tolist(),
        "dtype": "float32",
        "shape": list(targets.shape),
    }
    if targets.crow_indices is not None and targets.col_indices is not None:
        tensor["sparse_crow_indices"] = np.frombuffer(targets.crow_indices, dtype="<i8").tolist()
        tensor["sparse_col_indices"] = np.frombuffer(targets.col_indices, dtype="<i8").tolist()
    return tensor


def _json_alternatives(drawn: TopK) -> dict[str, Any]:
    shape = [drawn.length, drawn.k]
    token_ids = np.frombuffer(drawn.token_ids, dtype="<i4").tolist()
    logprobs = np.frombuffer(drawn.logprobs, dtype="<f4").tolist()
    return {
        "tokens": {"data": token_ids, "dtype": "int64", "shape": shape},
        "logprobs": {"data": logprobs, "dtype": "float32", "shape": shape},
    }
