"""One server with the tiny model for all client tests."""

import pytest
from tests.contract.clients.running import HERE, NEWEST, REPOSITORY, Client, needed
from tests.contract.clients.workplace import MODEL, furnish

from examples.local_server import local_server


@pytest.fixture(scope="session")
def output_dir(tmp_path_factory):
    """Where the server keeps everything."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(output_dir):
    """The URL of a server that knows the tiny model under the cookbook's name for it, too."""
    overrides = {"model_aliases": f"[{MODEL}]", "max_lora_rank": "32"}
    with local_server(REPOSITORY / "configs" / "tiny.yaml", output_dir=output_dir, overrides=overrides) as running:
        yield running.url


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder furnished with the tokenizer and the data sets of the recipes."""
    return furnish(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="session")
def cookbook(server, workplace):
    """The newest client, in the workplace."""
    needed(NEWEST)
    client = Client(name=NEWEST, folder=workplace, url=server)
    client.run(str(HERE / "lessons.py"), str(workplace / "HuggingFaceH4/no_robots/train.jsonl"))
    return client
