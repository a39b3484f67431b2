"""A device that has no room for what the sampler does: nothing is lost, others draw the same, and only what has no room alone fails."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.small_device import SmallDevice

from gradstream.engine.models.base import BaseModel
from gradstream.engine.models.build import load_base
from gradstream.engine.sampler.choice import Choice, key_of
from gradstream.engine.sampler.decoding import Decoding, Slice
from gradstream.engine.sampler.request import Finished, PromptQuestions, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine, SamplerLimits
from gradstream.engine.sampler.stops import StopRule
from gradstream.shared.errors import OutOfMemory
from gradstream.shared.ids import FutureId


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base(Path("tests/models/tiny-qwen3-shakespeare"), device=torch.device("cpu"), dtype=torch.float32)


def request(number: int, *, length: int, num_samples: int = 1, max_tokens: int = 10, topk: int = 0) -> SampleRequest:
    return SampleRequest(
        name=str(number),
        adapter=None,
        prompt=np.random.default_rng(number).integers(4, 2000, length).astype(np.int32),
        max_tokens=max_tokens,
        choice=Choice(temperature=0.8, top_k=-1, top_p=0.95),
        stop=StopRule(token_ids=frozenset()),
        keys=tuple(key_of(seed=number, job="", sample_index=index) for index in range(num_samples)),
        questions=PromptQuestions(logprobs=True, topk=topk),
        topk_sample=topk,
    )


REQUESTS = [
    request(0, length=7, num_samples=3, max_tokens=14),
    request(1, length=1, max_tokens=1, topk=2),
    request(2, length=30, num_samples=2, max_tokens=8),
    request(3, length=12, max_tokens=20),
]


def run(
    base: BaseModel,
    requests: Sequence[SampleRequest],
    device: SmallDevice,
    *,
    repeats: bool = False,
    limits: SamplerLimits | None = None,
) -> list[Finished]:
    """The answers in the order of the requests. repeats: a step that had no room is only repeated."""
    engine = SamplerEngine(base=base, limits=limits or SamplerLimits())
    for one in requests:
        engine.add(one)
    answers: dict[int, Finished] = {}
    with device:
        while engine.has_work():
            try:
                answers |= {id(one.request): one for one in engine.step()}
            except torch.OutOfMemoryError:
                has_room = False
            else:
                has_room = True
            if not (has_room or repeats):
                engine.give_way(OutOfMemory("no room"))
    assert device.held_bytes == 0
    return [answers[id(one)] for one in requests]


def assert_same(found: Finished, wanted: Finished, *, atol: float) -> None:
    assert found.error is None
    for one, other in zip(found.sequences, wanted.sequences, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol, rtol=0)
    np.testing.assert_allclose(found.scores.logprobs, wanted.scores.logprobs, atol=atol, rtol=0)


@pytest.mark.parametrize("first", range(0, 401, 134))
def test_a_step_that_found_no_room_anywhere_in_it_gives_the_same_bits_when_it_is_repeated(
    base: BaseModel, first: int
) -> None:
    wanted = run(base, REQUESTS, SmallDevice())
    device = SmallDevice(refused=range(first, 5000, 401))
    found = run(base, REQUESTS, device, repeats=True)
    assert device.num_refusals > 4
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, atol=0)


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_samples_without_room_side_by_side_are_all_answered(base: BaseModel, share: float) -> None:
    whole = SmallDevice()
    wanted = run(base, REQUESTS, whole)
    small = SmallDevice(room_bytes=int(share * whole.peak_bytes))
    found = run(base, REQUESTS, small)
    assert small.num_refusals > 0
    assert small.peak_bytes <= share * whole.peak_bytes
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, atol=1e-5)


def test_of_samples_that_outgrow_the_device_the_newest_waits_and_the_oldest_never_begins_anew(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(number, length=4, num_samples=4, max_tokens=64) for number in range(3)]
    whole = SmallDevice()
    wanted = run(base, requests, whole)
    begun: list[str] = []
    prefill = SamplerEngine._prefill

    def counted(engine: SamplerEngine, started: Sequence[SampleRequest]) -> None:
        prefill(engine, started)
        begun.extend(one.name for one in started)

    monkeypatch.setattr(SamplerEngine, "_prefill", counted)
    small = SmallDevice(room_bytes=int(0.7 * whole.peak_bytes))
    found = run(base, requests, small)
    assert begun[:3] == ["0", "1", "2"]
    assert (begun.count("0"), begun.count("2") > 1) == (1, True)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, atol=1e-5)


def test_only_what_has_no_room_alone_fails(base: BaseModel) -> None:
    large = request(9, length=400, max_tokens=3)
    alone, others = SmallDevice(), SmallDevice()
    run(base, [large], alone)
    wanted = run(base, REQUESTS, others)
    assert others.peak_bytes < alone.peak_bytes
    device = SmallDevice(room_bytes=(others.peak_bytes + alone.peak_bytes) // 2)
    found = run(base, [REQUESTS[0], large, *REQUESTS[1:]], device)
    failed = found.pop(1)
    assert isinstance(failed.error, OutOfMemory)
    assert failed.sequences == []
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, atol=1e-5)


@pytest.mark.parametrize("length", [100, 400])
def test_a_sample_that_has_room_alone_does_not_fail_for_what_those_before_it_left(base: BaseModel, length: int) -> None:
    limits = SamplerLimits(max_rows=16)
    requests = [request(5, length=20, num_samples=16, max_tokens=40), request(9, length=length, max_tokens=3)]
    wanted: list[Finished] = []
    room_bytes = 0
    for one in requests:
        alone = SmallDevice()
        wanted += run(base, [one], alone, limits=limits)
        room_bytes = max(room_bytes, alone.peak_bytes)
    device = SmallDevice(room_bytes=room_bytes)
    found = run(base, requests, device, limits=limits)
    assert device.num_refusals > 0
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, atol=1e-5)


def test_samples_of_one_request_without_room_together_are_drawn_some_at_a_time(base: BaseModel) -> None:
    many = request(5, length=20, num_samples=16, max_tokens=9)
    whole = SmallDevice()
    (wanted,) = run(base, [many], whole)
    decoding = Decoding(base=base, rank=0, num_ranks=1)
    decoding.admit(FutureId("s:sample:0:1"), many, targets=None)
    part = Slice(num_left=None)
    with SmallDevice(room_bytes=whole.peak_bytes // 2) as device:
        decoding.run_in_little_room(part)
    assert device.num_refusals > 0
    ((_, found),) = part.ended
    assert_same(found, wanted, atol=1e-5)


def test_a_sample_without_room_is_told_what_helps(base: BaseModel) -> None:
    decoding = Decoding(base=base, rank=0, num_ranks=1)
    decoding.admit(FutureId("s:sample:0:1"), replace(REQUESTS[0], questions=PromptQuestions()), targets=None)
    part = Slice(num_left=4)
    with SmallDevice(room_bytes=1000):
        decoding.run_in_little_room(part)
    ((_, found),) = part.ended
    assert isinstance(found.error, OutOfMemory)
    assert found.error.message.startswith("sample: the device has no room for it, and nothing was changed (CUDA out of")
    assert "ask for a shorter prompt, fewer tokens" in found.error.message


def test_another_error_is_not_taken_for_want_of_room(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    decoding = Decoding(base=base, rank=0, num_ranks=1)
    decoding.admit(FutureId("s:sample:0:1"), REQUESTS[0], targets=None)
    monkeypatch.setattr(base, "hidden", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        decoding.run_in_little_room(Slice(num_left=None))
