"""Frames to bytes and back, and what is refused."""

import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.disklog import batch, entry, future

from gradstream.shared import codec
from gradstream.shared.joblog.port import FutureStatus, RecordKind
from gradstream.worker.disklog import framing
from gradstream.worker.disklog.frames import (
    Dropped,
    LoggedBatch,
    LoggedJob,
    LoggedOutcome,
    LoggedRecord,
    PackedJob,
    Position,
    SegmentHead,
    Selection,
    SelectionEnd,
    Started,
    Stopped,
)
from gradstream.worker.disklog.framing import BadFrame, StrangeFrame

_SALT = 0x5EED

HEAD = SegmentHead(
    version=1,
    engine="main",
    epoch=3,
    index=1,
    fingerprint="torch=2",
    created_ms=1_700_000_000_000,
    salt=_SALT,
    after=Position("00000002-000000.seg", 4711),
)
JOB = LoggedJob(entry_id="5-0", at_ms=12, job=entry(5).job, ordered=False)
STARTED = Started(epoch=3, number=9, future_ids=[future(5)])
DROPPED = Dropped(future_ids=[future(5)])
STOPPED = Stopped(epoch=3, future_ids=[future(5)])
BATCH = LoggedBatch(
    epoch=3,
    number=9,
    plan=batch(9, [future(5)]).plan,
    outcomes=[LoggedOutcome(future_id=future(5), status=FutureStatus.FAILED, digest="ab", data=b"\x01\x02")],
    cursor="5-0",
    at_ms=13,
    records=[
        LoggedRecord(kind=RecordKind.MODEL, record_id="s:train:0", fields={"state": "ready"}),
        LoggedRecord(kind=RecordKind.CHECKPOINT, record_id="tinker://s:train:0/weights/a", fields=None),
    ],
    sources={future(5): "cd"},
    elapsed_ms=1.5,
    partial=True,
)
SELECTION = Selection(
    version=1,
    engine="main",
    fingerprint="torch=2",
    created_ms=14,
    salt=_SALT,
    owners=["s:train:0", "s:train:1"],
    asked=["s:train:0"],
    start="1-1",
    stop="3-9",
)
END = SelectionEnd(num_jobs=1, num_batches=2, num_partial=1)

# A job whose payload lies in it as a zstd frame, written once.
_PACKED = (
    "c4000000d8f28ade0083a474797065aa7061636b65645f6a6f62a66c6f6767656485a474797065a36a6f62a8656e7472795f6964a3352d30a561745f"
    "6d730ca36a6f6287a96675747572655f6964ab733a747261696e3a303a35a56f776e6572a9733a747261696e3a30a373657105a26f70b0666f727761"
    "72645f6261636b77617264a674656e616e74a56c6f63616ca77061796c6f6164c400aa6e756d5f746f6b656e7307a76f726465726564c2a77061796c"
    "6f6164c41428b52ffd24073900007061796c6f61645c2c2273"
)

# Bytes of version 1, written once. They stay as they are: old logs must read for good.
GOLDEN: dict[str, tuple[framing.AnyFrame, str]] = {
    "head": (
        HEAD,
        "8b00000037d908590089a474797065a468656164a776657273696f6e01a6656e67696e65a46d61696ea565706f636803"
        "a5696e64657801ab66696e6765727072696e74a7746f7263683d32aa637265617465645f6d73cf0000018bcfe56800a4"
        "73616c74cd5eeda5616674657282a77365676d656e74b330303030303030322d3030303030302e736567a66f66667365"
        "74cd1267",
    ),
    "job": (
        JOB,
        "950000001b9e4ae30085a474797065a36a6f62a8656e7472795f6964a3352d30a561745f6d730ca36a6f6287a9667574"
        "7572655f6964ab733a747261696e3a303a35a56f776e6572a9733a747261696e3a30a373657105a26f70b0666f727761"
        "72645f6261636b77617264a674656e616e74a56c6f63616ca77061796c6f6164c4077061796c6f6164aa6e756d5f746f"
        "6b656e7307a76f726465726564c2",
    ),
    "started": (
        STARTED,
        "350000008417d1a70084a474797065a773746172746564a565706f636803a66e756d62657209aa6675747572655f6964"
        "7391ab733a747261696e3a303a35",
    ),
    "dropped": (
        DROPPED,
        "26000000875d00b70082a474797065a764726f70706564aa6675747572655f69647391ab733a747261696e3a303a35",
    ),
    "stopped": (
        STOPPED,
        "2d0000003cdd68f60083a474797065a773746f70706564a565706f636803aa6675747572655f69647391ab733a747261696e3a303a35",
    ),
    "batch": (
        BATCH,
        "6a01000034ca7b16008ba474797065a56261746368a565706f636803a66e756d62657209a4706c616e83a46b696e64b0"
        "666f72776172645f6261636b77617264aa6675747572655f69647391ab733a747261696e3a303a35b1726f775f627564"
        "6765745f746f6b656e73cd0200a86f7574636f6d65739184a96675747572655f6964ab733a747261696e3a303a35a673"
        "7461747573a66661696c6564a6646967657374a26162a464617461c4020102a6637572736f72a3352d30a561745f6d73"
        "0da77265636f7264739283a46b696e64a56d6f64656ca97265636f72645f6964a9733a747261696e3a30a66669656c64"
        "7381a57374617465a5726561647983a46b696e64aa636865636b706f696e74a97265636f72645f6964bc74696e6b6572"
        "3a2f2f733a747261696e3a302f776569676874732f61a66669656c6473c0a7736f757263657381ab733a747261696e3a"
        "303a35a26364aa656c61707365645f6d73cb3ff8000000000000a77061727469616cc3",
    ),
    "selection": (
        SELECTION,
        "8d0000009666b5e4008aa474797065a973656c656374696f6ea776657273696f6e01a6656e67696e65a46d61696eab66"
        "696e6765727072696e74a7746f7263683d32aa637265617465645f6d730ea473616c74cd5eeda66f776e65727392a973"
        "3a747261696e3a30a9733a747261696e3a31a561736b656491a9733a747261696e3a30a57374617274a3312d31a47374"
        "6f70a3332d39",
    ),
    "end": (
        END,
        "2e000000ae4b061b0084a474797065a3656e64a86e756d5f6a6f627301ab6e756d5f6261746368657302ab6e756d5f70"
        "61727469616c01",
    ),
}


def read_all(data: bytes, *, salt: int = _SALT) -> framing.AnyFrame:
    return framing.read(io.BytesIO(data), room=len(data), salt=salt).decode()


@pytest.mark.parametrize(("frame", "golden"), GOLDEN.values(), ids=GOLDEN.keys())
def test_bytes_of_version_1_read_as_the_frame_that_was_written(frame: framing.AnyFrame, golden: str):
    assert read_all(bytes.fromhex(golden)) == frame


@pytest.mark.parametrize(("frame", "golden"), GOLDEN.values(), ids=GOLDEN.keys())
def test_frames_are_written_as_in_version_1(frame: framing.AnyFrame, golden: str):
    assert framing.pack(frame, salt=_SALT).hex() == golden


def test_large_frames_are_compressed_and_read_back():
    frame = Dropped(future_ids=[future(number) for number in range(1000)])

    data = framing.pack(frame, salt=_SALT)

    assert len(data) < 10_000
    assert read_all(data) == frame


@given(bit=st.integers(min_value=0, max_value=8 * len(framing.pack(STARTED, salt=_SALT)) - 1))
def test_a_frame_with_one_flipped_bit_is_bad(bit: int):
    data = bytearray(framing.pack(STARTED, salt=_SALT))
    data[bit // 8] ^= 1 << bit % 8

    with pytest.raises(BadFrame):
        read_all(bytes(data))


@pytest.mark.parametrize("num_bytes", range(len(framing.pack(DROPPED, salt=_SALT))))
def test_a_frame_cut_short_is_bad(num_bytes: int):
    with pytest.raises(BadFrame):
        read_all(framing.pack(DROPPED, salt=_SALT)[:num_bytes])


def test_a_frame_of_another_file_is_bad():
    with pytest.raises(BadFrame):
        read_all(framing.pack(DROPPED, salt=_SALT), salt=_SALT + 1)


@pytest.mark.parametrize("salt", [0, _SALT])
def test_zeros_are_no_frame(salt: int):
    with pytest.raises(BadFrame):
        read_all(bytes(4096), salt=salt)


def test_a_length_over_the_limit_is_refused_before_anything_is_read():
    file = io.BytesIO(struct.pack("<IIB", 0xFFFF_FFFF, 0, 0) + bytes(100))

    with pytest.raises(BadFrame):
        framing.read(file, room=2**40, salt=0)

    assert file.tell() == framing.PREFIX.size


def test_a_compressed_body_that_expands_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(framing, "MAX_BODY_BYTES", 10_000)
    body = codec.compress(bytes(100_000))
    data = struct.pack("<IIB", len(body), zlib.crc32(body, zlib.crc32(b"\x01", _SALT)), 1) + body

    with pytest.raises(StrangeFrame, match="expands to more than 10000 bytes"):
        read_all(data)


def test_an_unknown_kind_of_frame_is_strange_and_not_torn():
    body = b"\x81\xa4type\xa6future"
    data = struct.pack("<IIB", len(body), zlib.crc32(body, zlib.crc32(b"\x00", _SALT)), 0) + body

    with pytest.raises(StrangeFrame):
        read_all(data)


@given(before=st.binary(max_size=64), size=st.integers(min_value=20, max_value=60))
def test_a_frame_is_found_behind_any_bytes_and_across_chunks(before: bytes, size: int):
    frame = framing.pack(STARTED, salt=_SALT)
    file = io.BytesIO(before + frame + b"rest")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "_CHUNK_BYTES", size)
        found = framing.find_frame(file, start=0, end=len(before + frame) + 4, salt=_SALT)

    assert found == len(before)


def test_a_packed_job_whose_payload_is_no_zstd_frame_is_strange():
    data = framing.pack(PackedJob(logged=JOB, payload=b"no zstd frame"), salt=_SALT)
    raw = framing.read(io.BytesIO(data), room=len(data), salt=_SALT)
    with pytest.raises(StrangeFrame, match="payload"):
        raw.decode()


def test_a_job_that_was_packed_reads_as_it_did_when_it_was_first_written():
    data = bytes.fromhex(_PACKED)
    raw = framing.read(io.BytesIO(data), room=len(data), salt=_SALT)
    assert raw.decode() == JOB
