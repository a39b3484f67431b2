"""Two processes of a stock SDK that train one model at once give what one process gives that does the same in the same order."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from tests.contract.clients.running import NEWEST, OLDER, Client, needed
from tests.contract.clients.workplace import MODEL

from gradstream.shared.embedded.paths import socket_path
from gradstream.shared.ids import LANE_SEQS
from gradstream.shared.joblog.keys import Keys

pytestmark = [pytest.mark.e2e, pytest.mark.clients, pytest.mark.slow]

# Gradients of one step are summed in another order when calls share a pass of the model.
CLOSE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the two processes saw, the order in which the server did their calls, and what one process saw that did the same."""

    both: dict
    order: list[str]
    alone: dict


def journaled(output_dir: Path, model_id: str) -> list[str]:
    """The futures of a model in the order in which they ran."""
    client = redis.Redis(unix_socket_path=str(socket_path(output_dir / "redis")))
    with client:
        entries = client.xrange(Keys().journal)
    futures = [future for _, fields in entries for future in fields[b"futures"].decode().split()]
    return [future for future in futures if future.startswith(f"{model_id}:")]


def calls_in_order(output_dir: Path, both: dict) -> list[str]:
    """Those of the reported calls that trained, as `lane:seq_id`, in the order of the journal."""
    seqs = [int(future.rsplit(":", 1)[1]) for future in journaled(output_dir, both["model_id"])]
    names = ["{}:{}".format(*divmod(seq, LANE_SEQS)) for seq in seqs]
    return [name for name in names if name in both["calls"]]


def replayed(client: Client, both: dict, order: Sequence[str]) -> dict:
    """What one process of the same SDK sees that makes these calls."""
    words = ["step" if "step" in both["calls"][name] else name for name in order]
    return client.json("together.py", client.url, MODEL, json.dumps(words))


@pytest.fixture(scope="session", params=[NEWEST, *OLDER])
def run(request, server, output_dir, workplace) -> Run:
    needed(request.param)
    client = Client(name=request.param, folder=workplace, url=server)
    both = client.json("together.py", server, MODEL)
    order = calls_in_order(output_dir, both)
    return Run(both=both, order=order, alone=replayed(client, both, order))


def close(value: object) -> object:
    return pytest.approx(value, rel=CLOSE, abs=CLOSE)


def test_every_call_of_both_processes_ran_once_and_each_lane_in_its_own_order(run):
    assert sorted(run.order) == sorted(run.both["calls"])
    for lane in ("0", "7"):
        seq_ids = [int(name.split(":")[1]) for name in run.order if name.split(":")[0] == lane]
        # Two lanes of 8 + 2 and 7 + 1 calls.
        assert seq_ids == list(range(1, 11 if lane == "0" else 9))


def test_each_call_gives_what_it_gives_to_one_process_that_makes_the_calls_in_this_order(run):
    for name, alone in zip(run.order, run.alone["calls"], strict=True):
        together = run.both["calls"][name]
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            if key == "logprobs":
                assert [close(values) for values in value] == together[key]
            else:
                assert together[key] == close(value), (name, key)


def test_both_processes_see_the_weights_that_one_process_would_have_made(run):
    for end in run.both["ends"].values():
        assert end["loss"] == close(run.alone["end"]["loss"])
        assert end["snapshot"][0] is None
        assert end["snapshot"][1:] == close(run.alone["end"]["snapshot"][1:])


def test_the_gradients_of_both_processes_are_in_each_step(run, server, workplace):
    client = Client(name=NEWEST, folder=workplace, url=server)
    needed(NEWEST)
    first_step = next(at for at, name in enumerate(run.order) if "step" in run.both["calls"][name])
    for lane in ("0:", "7:"):
        order = [
            name
            for name in run.order[: first_step + 1]
            if not name.startswith(lane) or "step" in run.both["calls"][name]
        ]
        without = replayed(client, run.both, order)["calls"][-1]["grad_norm"]
        assert abs(without / run.both["calls"][run.order[first_step]]["grad_norm"] - 1) > 100 * CLOSE


def test_a_process_that_names_no_lane_hears_of_the_header(run):
    assert "seq_id 1 of" in run.both["stray"]
    assert "was used with another payload" in run.both["stray"]
    assert "the header X-Gradstream-Lane names another (1 to 999)" in run.both["stray"]
