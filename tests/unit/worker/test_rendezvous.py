"""Where the ranks meet, and what is typed on machines that the launcher does not reach."""

from pathlib import Path

import pytest

from gradstream.shared.config import ConfigError
from gradstream.worker.rendezvous import Mode, Rendezvous, check_split, commands, rendezvous


def meeting(*, mode: str = "auto", num_nodes: int = 1, host: str | None = None, port: int | None = None) -> Rendezvous:
    return rendezvous(mode=mode, num_nodes=num_nodes, host=host, port=port)


def test_ranks_of_one_machine_meet_without_a_port():
    assert meeting() == Rendezvous(mode=Mode.AUTO, host=None, port=None, num_nodes=1)
    assert meeting().is_on_one_machine


def test_several_machines_meet_at_torchruns_port_unless_another_one_is_named():
    assert meeting(num_nodes=2, host="head").port == 29500
    assert meeting(num_nodes=2, host="head", port=7).port == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "x"}, "--mode: 'x' is not a mode; use auto, .* or connect"),
        ({"num_nodes": 0}, "--nnodes: 0 is no number of machines"),
        ({"num_nodes": 2}, "--master-addr: missing"),
    ],
    ids=["mode", "nodes", "address"],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        meeting(**options)


def test_ranks_that_do_not_divide_among_the_machines_are_refused():
    with pytest.raises(ConfigError, match="2 nodes cannot share num_ranks: 3 evenly"):
        check_split(meeting(num_nodes=2, host="h"), 3)


def test_in_auto_mode_the_first_machine_needs_no_command():
    lines = commands(
        meeting(num_nodes=3, host="head"), num_ranks=6, config=Path("my config.yaml"), overrides=["--server.seed=7"]
    )
    assert lines == [
        f"torchrun --nnodes=3 --node_rank={rank} --nproc_per_node=2 --master_addr=head --master_port=29500 "
        "-m gradstream.worker --config 'my config.yaml' --server.seed=7"
        for rank in (1, 2)
    ]


def test_in_connect_mode_every_machine_needs_a_command():
    lines = commands(meeting(mode="connect", num_nodes=2, host="h"), num_ranks=2, config=Path("c"), overrides=[])
    assert [f"--node_rank={rank}" in line for rank, line in enumerate(lines)] == [True, True]
