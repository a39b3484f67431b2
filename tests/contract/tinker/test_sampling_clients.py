"""Several clients of one sampler: one poll for many samples, numbers of their own, samples given up."""

import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis
import tinker
from tests.support.cards import MODEL_NAME
from tests.support.polling import wait_until
from tests.support.rig import FAST, LIMITS, Rig, running_rig
from tinker import types

from gradstream.shared.joblog.keys import Keys

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}


@pytest.fixture
def sdk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    monkeypatch.setenv("TINKER_BASE_URL", rig.base_url)
    client = tinker.ServiceClient()
    yield client
    client.holder.close()


@pytest.fixture
def sampler(rig: Rig) -> str:
    """A new sampler's id."""
    body = {"session_id": rig.session(), "sampling_session_seq_id": 0, "base_model": MODEL_NAME}
    return rig.ok(rig.post("create_sampling_session", body))["sampling_session_id"]


def sample(rig: Rig, sampler: str, seq: int) -> str:
    """The future of a new sample."""
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "num_samples": 1,
        "prompt": PROMPT,
        "sampling_params": {"max_tokens": 3},
    }
    return rig.ok(rig.post("asample", body))["request_id"]


def retrieve(rig: Rig, sampler: str, *, block: int = 0, cursor: int = 0, **fields: object) -> dict[str, object]:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": block}
    return rig.ok(rig.post("retrieve_futures", {"target": target, "prev_cursor": cursor, **fields}))


def test_the_sdk_gets_many_samples_by_one_poll(sdk: tinker.ServiceClient, rig: Rig) -> None:
    client = sdk.create_sampling_client(base_model=MODEL_NAME)
    params = types.SamplingParams(max_tokens=4, seed=3)
    prompt = types.ModelInput.from_ints([1, 2, 3])
    pending = [client.sample(prompt, num_samples=1, sampling_params=params) for _ in range(50)]
    assert {tuple(future.result(timeout=60).sequences[0].tokens) for future in pending} != set()
    polls = rig.http.get("/metrics").text
    assert 'route="/api/v1/retrieve_futures"' in polls


def test_copies_of_a_client_number_their_samples_apart(sdk: tinker.ServiceClient, rig: Rig) -> None:
    client = sdk.create_sampling_client(base_model=MODEL_NAME)
    copies = [pickle.loads(pickle.dumps(client)) for _ in range(2)]  # noqa: S301  our own bytes
    params = types.SamplingParams(max_tokens=2)
    for each in (client, *copies):
        each.sample(types.ModelInput.from_ints([1]), num_samples=1, sampling_params=params).result(timeout=60)
    seqs = sorted(seq for _, seq, op in rig.worker.seen if op == "sample")
    assert seqs == [0, 10**9, 2 * 10**9]
    for each in copies:
        each.holder.close()


def test_a_client_hears_of_its_own_block_only_in_the_order_of_finishing(rig: Rig, sampler: str) -> None:
    mine = [sample(rig, sampler, seq) for seq in (0, 1)]
    theirs = sample(rig, sampler, 7 * 10**9 + 1)
    for future in (*mine, theirs):
        rig.result(future)
    found = retrieve(rig, sampler)
    assert [item["request_id"] for item in found["completions"]] == mine
    assert {item["state"] for item in found["completions"]} == {"finished"}
    assert all(item["response_payload_uncompressed_size"] > 0 for item in found["completions"])
    assert [item["request_id"] for item in retrieve(rig, sampler, block=7)["completions"]] == [theirs]


def test_a_cursor_goes_on_where_the_answer_before_ended(rig: Rig, sampler: str) -> None:
    first = sample(rig, sampler, 0)
    rig.result(first)
    cursor = retrieve(rig, sampler)["cursor"]
    second = sample(rig, sampler, 1)
    rig.result(second)
    found = retrieve(rig, sampler, cursor=cursor, retrieved_request_ids=[first, "else:sample:0:1", "x y"])
    assert [item["request_id"] for item in found["completions"]] == [second]
    # What a cursor has passed is forgotten, also for a client that starts over.
    assert [item["request_id"] for item in retrieve(rig, sampler)["completions"]] == [second]


def test_many_results_are_acknowledged_in_one_poll(rig: Rig, sampler: str, redis_url: str, engine_name: str) -> None:
    future = sample(rig, sampler, 0)
    while not retrieve(rig, sampler)["completions"]:
        pass
    forgotten = [f"{sampler}:{seq}" for seq in range(1, 300)]
    retrieve(rig, sampler, timeout=0, retrieved_request_ids=[*forgotten, future])
    # No client waits for it, so it happens after the answer.
    deadline_s = time.monotonic() + 60.0
    with redis.Redis.from_url(redis_url) as client:
        while not 0 < client.ttl(Keys(engine_name).future(future)) <= LIMITS.delivered_ttl_s:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_a_poll_waits_for_the_first_sample_and_timeout_0_does_not(redis_url: str, engine_name: str) -> None:
    # Held for longer than a client here waits for an answer.
    config = replace(FAST, poll_hold_s=1000.0)
    with running_rig(redis_url, engine=engine_name, config=config) as rig, ThreadPoolExecutor(1) as threads:
        body = {"session_id": rig.session(), "sampling_session_seq_id": 0, "base_model": MODEL_NAME}
        sampler = rig.ok(rig.post("create_sampling_session", body))["sampling_session_id"]
        assert retrieve(rig, sampler, timeout=0, cursor=5) == {"completions": [], "cursor": 5}
        poll = threads.submit(retrieve, rig, sampler)
        wait_until(lambda: "gradstream_api_polls_parked 1.0" in rig.http.get("/metrics").text)
        future = sample(rig, sampler, 0)
        assert [item["request_id"] for item in poll.result()["completions"]] == [future]


def test_a_cancelled_sample_fails_and_is_never_a_result(rig: Rig, sampler: str) -> None:
    rig.worker.pause()
    future = sample(rig, sampler, 0)
    assert rig.post("cancel_future", {"request_id": future}).status_code == 204
    answer = rig.ok(rig.poll(future))
    assert (answer["category"], answer["code"]) == ("user", "cancelled")
    assert retrieve(rig, sampler)["completions"] == [{"state": "failed", "request_id": future}]
    rig.worker.resume()
    rig.result(sample(rig, sampler, 1))
    assert [seq for _, seq, op in rig.worker.seen if op == "sample"] == [1]
    assert rig.ok(rig.poll(future))["code"] == "cancelled"


@pytest.mark.parametrize("name", ["nobody:sample:0:0", "", "not an id", "x" * 500])
def test_cancelling_what_there_is_not_is_fine(rig: Rig, name: str) -> None:
    assert rig.post("cancel_future", {"request_id": name}).status_code == 204


def test_only_samples_that_wait_can_be_cancelled(rig: Rig, sampler: str) -> None:
    done = sample(rig, sampler, 0)
    result = rig.result(done)
    model = rig.model()
    rig.worker.pause()
    training = rig.ok(rig.step(model, 1))["request_id"]
    for future in (done, training):
        assert rig.post("cancel_future", {"request_id": future}).status_code == 204
    rig.worker.resume()
    assert rig.result(done) == result
    assert "metrics" in rig.result(training)


def test_each_client_that_joins_gets_the_next_number(rig: Rig, sampler: str) -> None:
    joined = [rig.ok(rig.post("join_sampling_session", {"sampling_session_id": sampler})) for _ in range(3)]
    assert [answer["client_counter"] for answer in joined] == [1, 2, 3]


@pytest.mark.parametrize("path", ["join_sampling_session", "retrieve_futures"])
def test_a_sampler_that_there_is_not_is_a_404(rig: Rig, path: str) -> None:
    named = {"sampling_session_id": "nobody:sample:0"}
    body = named if path == "join_sampling_session" else {"target": {"type": "sampling_session", **named}}
    answer = rig.post(path, body)
    assert (answer.status_code, answer.json()["error"]) == (404, "unknown_model")


@pytest.mark.parametrize(
    "fields",
    [
        {"prev_cursor": -1},
        {"prev_cursor": 2**63},
        {"timeout": -1},
        {"timeout": "x"},
        {"retrieved_request_ids": 1},
        {"retrieved_request_ids": ["x"] * 20_001},
    ],
    ids=["negative", "too high", "past", "text", "number", "too many"],
)
def test_a_poll_that_is_wrong_is_refused_by_name(rig: Rig, sampler: str, fields: dict[str, object]) -> None:
    target = {"type": "sampling_session", "sampling_session_id": sampler}
    answer = rig.post("retrieve_futures", {"target": target, **fields})
    assert answer.status_code == 400
    assert next(iter(fields)) in answer.json()["detail"]


def test_custom_losses_are_refused_with_an_alternative(rig: Rig) -> None:
    answer = rig.post("create_custom_loss", {"session_id": "s", "custom_loss_seq_id": 0, "graph": {}})
    assert (answer.status_code, answer.json()["error"]) == (400, "unsupported")
    assert "forward_backward_custom" in answer.json()["detail"]
