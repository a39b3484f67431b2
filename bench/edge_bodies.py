"""Bodies of forward_backward as the tinker SDK sends them, made once; only the seq_id in front differs between two requests."""

from dataclasses import dataclass

import numpy as np

from gradstream.api.tinker.proto import wire_pb2

VOCAB_SIZE = 151_936
CONTEXT_TOKENS = 262_144


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """num_datums of num_tokens each. has_floats: random log-probabilities and advantages, as RL sends them, instead of weights of one."""

    name: str
    num_datums: int
    num_tokens: int
    has_floats: bool = False


SMALL = Shape(name="4 x 64 tokens", num_datums=4, num_tokens=64)
LONG = Shape(name="1 x 131072 tokens", num_datums=1, num_tokens=131_072)
MANY = Shape(name="64 x 2048 tokens", num_datums=64, num_tokens=2048)
RL = Shape(name="64 x 2048 tokens, RL", num_datums=64, num_tokens=2048, has_floats=True)
# 3.3 MB, the size in which a rival's users had their trouble.
BURST = Shape(name="103 x 2001 tokens", num_datums=103, num_tokens=2001)


def tail_of(shape: Shape) -> bytes:
    """The message without model_id and seq_id. Token ids are as frequent as words are (Zipf)."""
    generator = np.random.default_rng(0)
    data = [_datum(generator, shape) for _ in range(shape.num_datums)]
    loss = "importance_sampling" if shape.has_floats else "cross_entropy"
    return wire_pb2.ForwardBackwardRequest(data=data, loss_fn=loss).SerializeToString()


def body_of(model: str, seq: int, tail: bytes) -> bytes:
    """The whole message: protobuf messages end to end are one message."""
    return wire_pb2.ForwardBackwardRequest(model_id=model, seq_id=seq).SerializeToString() + tail


def _datum(generator: np.random.Generator, shape: Shape) -> wire_pb2.Datum:
    tokens = (generator.zipf(1.3, shape.num_tokens + 1) % (VOCAB_SIZE - 1)).astype("<i4")
    inputs = {"target_tokens": _tensor(tokens[1:].astype("<i8"), wire_pb2.DTYPE_INT64)}
    if shape.has_floats:
        for name in ("logprobs", "advantages"):
            values = generator.standard_normal(shape.num_tokens).astype("<f4")
            inputs[name] = _tensor(values, wire_pb2.DTYPE_FLOAT32)
    else:
        inputs["weights"] = _tensor(np.ones(shape.num_tokens, dtype="<f4"), wire_pb2.DTYPE_FLOAT32)
    text = wire_pb2.EncodedText(tokens=tokens[:-1].tobytes())
    return wire_pb2.Datum(model_input=[wire_pb2.Chunk(encoded_text=text)], loss_fn_inputs=inputs)


def _tensor(values: np.ndarray, dtype: wire_pb2.DType.ValueType) -> wire_pb2.Tensor:
    return wire_pb2.Tensor(dense=values.tobytes(), dtype=dtype, shape=values.shape)
