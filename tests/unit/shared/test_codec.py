"""Bytes to wire types and back, and what hostile bytes do."""

import sys
import tracemalloc

import msgpack
import msgspec
import numpy as np
import pytest
import zstandard

from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge
from gradstream.shared.ids import FutureId, ModelId, SessionId, TenantId
from gradstream.shared.wire import (
    AdamParams,
    CreateModel,
    Failed,
    ForwardBackward,
    Job,
    LoraSpec,
    OptimStep,
    OptimStepDone,
    Payload,
    RestoreSnapshot,
    Sample,
    SamplingParams,
    UnloadModel,
)

JOB = Job(
    future_id=FutureId("s:train:0:1"),
    owner=ModelId("s:train:0"),
    seq=1,
    op="optim_step",
    tenant=TenantId("local"),
    payload=b"\x01\x02",
    num_tokens=3,
)
TOKENS = Column.of([np.array([1, 2, 3]), np.array([4])], dtype="int32")

# Bytes of wire version 1. They stay: whoever changes a type must still read them.
GOLDEN: dict[str, tuple[Payload, str]] = {
    "create_model": (
        CreateModel(session_id=SessionId("s"), base_model="tiny", lora=LoraSpec(rank=8, seed=5)),
        "84a474797065ac6372656174655f6d6f64656caa73657373696f6e5f6964a173aa626173655f6d6f64656ca474696e79a46c6f726182a472616e6b08a47365656405",
    ),
    "forward_backward": (
        ForwardBackward(tokens=TOKENS, inputs={}, loss_fn="cross_entropy"),
        "84a474797065b0666f72776172645f6261636b77617264a6746f6b656e7384a56474797065a5696e743332a76c656e67746873c41003000000000000000100000000000000a464617461c41001000000020000000300000004000000a8747261696c696e6790a6696e7075747380a76c6f73735f666ead63726f73735f656e74726f7079",
    ),
    "optim_step": (
        OptimStep(adam=AdamParams(learning_rate=0.5)),
        "82a474797065aa6f7074696d5f73746570a46164616d81ad6c6561726e696e675f72617465cb3fe0000000000000",
    ),
    "restore_snapshot": (
        RestoreSnapshot(directory="d", epoch=1, number=2, drop_others=True),
        "85a474797065b0726573746f72655f736e617073686f74a96469726563746f7279a164a565706f636801a66e756d62657202ab64726f705f6f7468657273c3",
    ),
    "unload_model": (UnloadModel(), "81a474797065ac756e6c6f61645f6d6f64656c"),
    "sample": (
        Sample(path=None, prompt=b"\x01\x00\x00\x00", params=SamplingParams(max_tokens=2, seed=7)),
        "84a474797065a673616d706c65a470617468c0a670726f6d7074c40401000000a6706172616d7382aa6d61785f746f6b656e7302a47365656407",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_payloads_have_the_bytes_of_version_1(name: str) -> None:
    value, golden = GOLDEN[name]
    assert codec.encode(value).hex() == golden
    assert codec.decode_payload(bytes.fromhex(golden)) == value


def test_outcomes_come_back_as_they_went() -> None:
    for outcome in (OptimStepDone(metrics={"a": 1.0}), Failed(code="c", category="user", message="m")):
        assert codec.decode_outcome(codec.encode(outcome)) == outcome


def test_another_msgpack_library_reads_the_same_values() -> None:
    data = msgpack.unpackb(msgspec.msgpack.encode(JOB))
    assert data["payload"] == b"\x01\x02"
    assert (data["seq"], data["op"]) == (1, "optim_step")


def test_fields_of_a_later_version_are_passed_over() -> None:
    data = msgpack.packb({"type": "unload_model", "reason": "from the future"})
    assert codec.decode_payload(data) == UnloadModel()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(JOB)[:-1],
        msgspec.msgpack.encode(JOB) + b"\x00",
        msgpack.packb({"type": "no_such_op"}),
        msgpack.packb({"type": "optim_step"}),
        msgpack.packb({"type": "optim_step", "adam": {"learning_rate": "fast"}}),
        msgpack.packb([1, 2, 3]),
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ],
    ids=["empty", "reserved", "cut", "trailing", "tag", "missing", "type", "list", "huge header", "depth bomb"],
)
def test_bytes_that_are_no_payload_are_an_invalid_request(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not valid msgpack"):
        codec.decode_payload(data)


def test_three_million_empty_lists_are_refused_without_building_them() -> None:
    bomb = b"\xdd" + (3_000_000).to_bytes(4, "big") + b"\x90" * 3_000_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            codec.decode_payload(bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3 * len(bomb) < 3_000_000 * sys.getsizeof([])


def test_a_frame_comes_back_whole_and_its_limit_is_exact() -> None:
    data = b"abc" * 50_000
    frame = codec.compress(data)
    assert len(frame) < len(data) // 100
    assert codec.decompress(frame, max_bytes=len(data)) == data
    with pytest.raises(PayloadTooLarge, match=f"body: expands to more than {len(data) - 1} bytes"):
        codec.decompress(frame, max_bytes=len(data) - 1)


@pytest.mark.parametrize("declares_size", [True, False], ids=["declared", "undeclared"])
def test_a_zstd_bomb_is_stopped_near_the_limit(declares_size: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=19)
    size = 512 * 1024**2
    if declares_size:
        bomb = compressor.compress(bytes(size))
    else:
        writer = compressor.compressobj()
        bomb = b"".join(writer.compress(bytes(1024**2)) for _ in range(size // 1024**2)) + writer.flush()
    assert len(bomb) < 100_000
    with pytest.raises(PayloadTooLarge):
        codec.decompress(bomb, max_bytes=1024**2)


def test_a_frame_says_what_it_holds_where_its_writer_knew_it() -> None:
    assert codec.declared_size(zstandard.ZstdCompressor().compress(b"x" * 1000)) == 1000
    assert codec.declared_size(zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 1000)) is None
    assert codec.declared_size(b"no frame at all") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame[:-3], "truncated"),
        (lambda frame: frame[:3], "truncated"),
        (lambda _: b"", "truncated"),
        (lambda frame: frame + b"x", "bytes follow"),
        (lambda frame: frame + frame, "bytes follow"),
        (lambda _: b"not zstd at all, but long enough", "not a valid zstd frame"),
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), "not a valid zstd frame"),
    ],
    ids=["cut", "header only", "empty", "trailing", "two frames", "garbage", "checksum"],
)
def test_a_broken_frame_is_an_invalid_request(change, message: str) -> None:
    frame = codec.compress(b"some text " * 100)
    with pytest.raises(InvalidRequest, match=message):
        codec.decompress(change(frame), max_bytes=10_000)


def test_a_window_beyond_the_limit_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = writer.compress(b"x" * 1000) + writer.flush()
    with pytest.raises(InvalidRequest, match="not a valid zstd frame"):
        codec.decompress(frame, max_bytes=10_000)


def test_the_op_of_a_forward_pass_tells_whether_it_has_gradients() -> None:
    def fb(*, backward: bool) -> ForwardBackward:
        return ForwardBackward(tokens=TOKENS, inputs={}, loss_fn="x", backward=backward)

    assert [codec.op_of(fb(backward=True)), codec.op_of(fb(backward=False))] == ["forward_backward", "forward"]
    assert codec.op_of(UnloadModel()) == "unload_model"


def test_the_digest_is_128_bits_of_blake2b() -> None:
    assert codec.digest(b"") == "cae66941d9efbd404e4d88758ea67670"


def test_targets_that_are_the_tokens_once_more_add_little_to_a_frame() -> None:
    tokens = np.random.default_rng(0).integers(0, 150_000, 200_001, dtype=np.int32)
    alone = len(codec.compress(tokens[:-1].tobytes()))
    assert len(codec.compress(tokens[:-1].tobytes() + tokens[1:].tobytes())) < 1.05 * alone
