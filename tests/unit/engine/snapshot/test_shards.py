import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gradstream.engine.snapshot.cut import WholeTensor, is_shard_name, shard_name
from gradstream.engine.snapshot.shards import Part, read_shards, whole, whole_part, write_shard
from gradstream.shared.errors import StorageFailure

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def files_of(directory):
    return sorted(path.name for path in directory.iterdir())


def write_parts(directory, tensor, bounds):
    """Rows of a matrix, split at bounds, one file a rank."""
    starts, ends = [0, *bounds], [*bounds, len(tensor)]
    for rank, (start, end) in enumerate(zip(starts, ends, strict=True)):
        write_shard(directory, {"w": Part(tensor=tensor[start:end], offsets=(start, 0))}, rank=rank)


@given(bounds=st.lists(st.integers(1, 6), max_size=3, unique=True).map(sorted))
def test_a_tensor_comes_back_whole_from_any_number_of_ranks(tmp_path_factory, bounds):
    directory = tmp_path_factory.mktemp("shards")
    tensor = torch.randn(7, 3)
    write_parts(directory, tensor, bounds)
    assert len(files_of(directory)) == len(bounds) + 1
    assert torch.equal(read_shards(directory, files_of(directory), {"w": whole(tensor)})["w"], tensor)


def test_torch_distributed_checkpoint_reads_the_files_of_three_ranks(tmp_path):
    tensor = torch.randn(7, 3)
    write_parts(tmp_path, tensor, [2, 3])
    found = {"w": torch.zeros(7, 3)}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(found["w"], tensor)


def test_the_files_of_torch_distributed_checkpoint_are_read(tmp_path):
    tensors = {"w": torch.randn(5), "m": torch.randn(2, 2).bfloat16()}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    assert files_of(tmp_path) == [shard_name(0)]
    found = read_shards(tmp_path, files_of(tmp_path), {name: whole(tensor) for name, tensor in tensors.items()})
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_every_bit_of_a_value_survives(tmp_path):
    odd = torch.tensor([0x7FC00001, 0x00000001, -0x80000000, 0x7F800000], dtype=torch.int32).view(torch.float32)
    write_shard(tmp_path, {"w": whole_part(odd)}, rank=0)
    found = read_shards(tmp_path, [shard_name(0)], {"w": whole(odd)})["w"]
    assert torch.equal(found.view(torch.int32), odd.view(torch.int32))


def test_a_missing_part_is_found(tmp_path):
    tensor = torch.randn(7, 3)
    write_parts(tmp_path, tensor, [2, 3])
    with pytest.raises(StorageFailure, match="'w' has 3 values too few"):
        read_shards(tmp_path, [shard_name(0), shard_name(2)], {"w": whole(tensor)})


@pytest.mark.parametrize(
    "expected",
    [
        WholeTensor(dtype="float32", shape=(6, 3)),
        WholeTensor(dtype="bfloat16", shape=(7, 3)),
        WholeTensor(dtype="float32", shape=(21,)),
    ],
    ids=["too long", "another dtype", "another number of dimensions"],
)
def test_a_part_that_does_not_lie_within_its_tensor_is_refused(tmp_path, expected):
    write_parts(tmp_path, torch.randn(7, 3), [])
    with pytest.raises(StorageFailure, match="it must lie within"):
        read_shards(tmp_path, [shard_name(0)], {"w": expected})


def test_a_tensor_that_nobody_named_is_refused(tmp_path):
    write_parts(tmp_path, torch.randn(7, 3), [])
    with pytest.raises(StorageFailure, match="holds 'w', which its manifest does not name"):
        read_shards(tmp_path, [shard_name(0)], {})


def damage_header(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def without_places(path):
    save_file({"w": torch.zeros(2)}, path)


@pytest.mark.parametrize("damage", [damage_header, without_places, lambda path: path.unlink()])
def test_an_unreadable_file_is_named(tmp_path, damage):
    write_shard(tmp_path, {"w": whole_part(torch.zeros(2))}, rank=0)
    damage(tmp_path / shard_name(0))
    with pytest.raises(StorageFailure, match=f"{shard_name(0)} cannot be read"):
        read_shards(tmp_path, [shard_name(0)], {"w": WholeTensor(dtype="float32", shape=(2,))})


def test_only_shards_have_their_names():
    assert is_shard_name(shard_name(0))
    assert is_shard_name(shard_name(123456))
    assert not is_shard_name("../" + shard_name(0))
    assert not is_shard_name("manifest.json")
