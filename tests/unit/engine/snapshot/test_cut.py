import hashlib
from contextlib import suppress

import msgspec
import pytest
from tests.support.snapshots import head

from gradstream.engine.checkpoint.manifest import FileEntry
from gradstream.engine.snapshot.cut import (
    Cut,
    ModelEntry,
    WholeTensor,
    cut_name,
    decode_cut,
    encode_cut,
    parse_name,
    shard_name,
)
from gradstream.shared.errors import StorageFailure
from gradstream.shared.wire import LoraSpec, OptimizerSpec

ENTRY = ModelEntry(
    directory="models/m+1/00000001-0000000002",
    files={shard_name(0): FileEntry(size_bytes=3, sha256="ab")},
    tensors={"weights": WholeTensor(dtype="float32", shape=(4,))},
    kind="lora",
    tenant="t",
    session_id="s",
    step=3,
    has_grad=True,
    spec=LoraSpec(rank=4, seed=2**62),
    scale=0.1,
    layout_digest="d",
    user_metadata={"name": 'ein "\u00c4pfel" \\ / \x01'},
)
CUT = Cut(head=head(2), models={"m:1": ENTRY})


def test_a_cut_comes_back_as_it_went():
    assert decode_cut(encode_cut(CUT), source="x") == CUT


def test_a_cut_from_before_there_were_other_optimizers_is_of_adamw_in_fp32():
    cut = msgspec.to_builtins(CUT)
    for name in ("optimizer", "reduction", "valid_tokens"):
        del cut["models"]["m:1"][name]
    text = msgspec.json.encode(cut)
    old = msgspec.json.encode({"version": 1, "sha256": hashlib.sha256(text).hexdigest(), "cut": msgspec.Raw(text)})
    assert decode_cut(old, source="x") == CUT
    assert CUT.models["m:1"].optimizer == OptimizerSpec()


def test_a_full_model_sharded_over_ranks_has_a_place_in_the_format():
    full = ModelEntry(
        directory=ENTRY.directory,
        files={shard_name(rank): FileEntry(size_bytes=3, sha256="ab") for rank in range(3)},
        tensors={"layers.0.weight": WholeTensor(dtype="bfloat16", shape=(4, 2))},
        kind="full",
        tenant="t",
        session_id="s",
        step=3,
        has_grad=False,
    )
    cut = Cut(head=head(2), models={"m:1": full})
    assert decode_cut(encode_cut(cut), source="x") == cut


def test_no_flipped_bit_gives_another_cut():
    data = encode_cut(CUT)
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            # A flip among the white space, or of a key that is not read, does no harm.
            with suppress(StorageFailure):
                assert decode_cut(bytes(damaged), source="x") == CUT


def test_no_shorter_file_is_a_cut():
    data = encode_cut(CUT).rstrip()
    for length in range(len(data)):
        with pytest.raises(StorageFailure, match="x is damaged"):
            decode_cut(data[:length], source="x")


def test_a_later_format_is_refused_with_its_version():
    data = encode_cut(CUT).replace(b'"version": 1', b'"version": 2')
    with pytest.raises(StorageFailure, match="x has format version 2; this server reads version 1"):
        decode_cut(data, source="x")


@pytest.mark.parametrize(
    "changes",
    [
        {"directory": "models/../x"},
        {"directory": "/models/a/b"},
        {"directory": "cuts/a/b"},
        {"directory": "models/a"},
        {"files": {"../x": FileEntry(size_bytes=3, sha256="ab")}},
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(changes):
    cut = Cut(head=head(2), models={"m:1": msgspec.structs.replace(ENTRY, **changes)})
    with pytest.raises(StorageFailure, match="the paths of model m:1"):
        decode_cut(encode_cut(cut), source="x")


def test_names_sort_as_ids_do_and_only_they_are_parsed():
    ids = [(1, 1), (1, 2), (1, 10), (2, 1), (10, 0)]
    assert sorted(map(cut_name, ids)) == [cut_name(cut_id) for cut_id in ids]
    assert [parse_name(cut_name(cut_id)) for cut_id in ids] == ids
    assert [parse_name(name) for name in ("", "1-2", "00000001", "00000001-000000000x", ".tmp")] == [None] * 5
