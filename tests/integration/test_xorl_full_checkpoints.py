"""Full-weight checkpoints on the whole server: a run over restarts and loads has the bits of one that nobody interrupted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.launched import Launch, launching
from tests.support.xorl_server import STEP, Client, data
from transformers import AutoModelForCausalLM

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import FileEntry, read_manifest

pytestmark = [pytest.mark.e2e]

FULL = "configs/tiny_full.yaml"


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launching(tmp_path) as start:
        yield start


def files_of(output_dir: Path, name: str, kind: str = "weights") -> dict[str, FileEntry]:
    """What a checkpoint of model default holds; equal for equal models."""
    uri = f"tinker://default/{kind}/{name}"
    return read_manifest(parse_uri(uri).directory(output_dir), source=uri).files


def train(client: Client, *seeds: int) -> list[object]:
    """Everything that the server answered."""
    answers: list[object] = []
    for seed in seeds:
        answers.append(client.done("forward_backward", forward_backward_input={"data": data(seed)}))
        answers.append(client.done("optim_step", **STEP))
    return answers


@pytest.mark.config_field("ckpt_manager", "skip_initial_checkpoint", "load_checkpoint_path")
def test_a_run_over_restarts_loads_and_both_formats_ends_with_the_bits_of_an_undisturbed_one(launch: Launch) -> None:
    calm = launch("--server.skip_initial_checkpoint", "true", config=FULL, name="calm").until_ready()
    expected = train(Client(calm), 1, 2, 3, 4)
    Client(calm).done("save_weights", path="end")
    assert [one["checkpoint_id"] for one in Client(calm).post("list_checkpoints").json()["checkpoints"]] == [
        "weights/end"
    ]
    calm.end()

    server = launch(config=FULL).until_ready()
    client = Client(server)
    first = client.loss("default")
    answers = train(client, 1, 2)
    client.done("save_weights", path="one")
    train(client, 9)
    server.end()

    server = launch("--server.ckpt_manager", "torch", config=FULL).until_ready()
    client = Client(server)
    client.done("load_weights", path="one")
    answers += train(client, 3)
    client.done("save_weights", path="two")
    train(client, 9)
    client.done("load_weights", path="000000")
    assert client.loss("default") == first
    assert client.post("delete_checkpoint", checkpoint_id="weights/000000").status_code == 403
    server.end()
    assert set(files_of(server.output_dir, "two")) == {"checkpoint.pt", "config.json"}

    path = parse_uri("tinker://default/weights/two").directory(server.output_dir)
    other = launch("--server.load_checkpoint_path", str(path), config=FULL, name="other").until_ready()
    client = Client(other)
    answers += train(client, 4)
    client.done("save_weights", path="end")
    assert answers == expected
    assert files_of(other.output_dir, "end") == files_of(calm.output_dir, "end")

    client.done("save_weights_for_sampler", name="served")
    served = parse_uri("tinker://default/sampler_weights/served").directory(other.output_dir)
    assert AutoModelForCausalLM.from_pretrained(served).num_parameters() > 0
