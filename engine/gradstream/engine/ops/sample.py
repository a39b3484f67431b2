"""Continuations of prompts. All samples of a batch run together; with several ranks each takes a share of them."""

from collections.abc import Sequence

import msgspec

from gradstream.engine.adapters.adapter import FrozenAdapter
from gradstream.engine.checkpoint.location import Ephemeral, parse_uri
from gradstream.engine.checkpoint.shared import load_frozen
from gradstream.engine.files import mark_used
from gradstream.engine.ops.registry import OPS, OpJob, failed
from gradstream.engine.sampler.answer import to_wire
from gradstream.engine.sampler.intake import to_request
from gradstream.engine.sampler.pieces import joined, pieces_of
from gradstream.engine.sampler.request import Finished, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine
from gradstream.engine.sampler.store import Resident
from gradstream.engine.state import EngineState
from gradstream.shared.errors import GradstreamError
from gradstream.shared.ids import TenantId
from gradstream.shared.wire import Failed, Outcome, Sample, SampleDone

_Answers = dict[int, SampleDone | Failed]


@OPS.register(Sample)
def sample(state: EngineState, jobs: Sequence[OpJob[Sample]]) -> list[Outcome]:
    """Serve all jobs. Each may fail with InvalidRequest, UnknownModel, Unsupported, NonFinite or StorageFailure."""
    requests: dict[int, SampleRequest] = {}
    answers: _Answers = {}
    for index, job in enumerate(jobs):
        try:
            requests[index] = _request(state, job)
        except GradstreamError as error:
            answers[index] = failed(error)
    share = {index: requests[index] for index in _shares(requests, state.comm.size)[state.comm.rank]}
    answers |= _gathered(state, _run(state, share, jobs))
    return [answers[index] for index in range(len(jobs))]


def _request(state: EngineState, job: OpJob[Sample]) -> SampleRequest:
    """The sampler's view of a job; collective where the adapter has to be read."""
    path = job.payload.path
    adapter = None if path is None else _adapter(state, path, job.job.tenant)
    return to_request(state, job.job, job.payload, adapter)


def _adapter(state: EngineState, path: str, tenant: TenantId) -> FrozenAdapter:
    location = parse_uri(path)
    if state.comm.is_leader and isinstance(location, Ephemeral):
        mark_used(location.directory(state.config.output_dir))
    adapter = state.samplers.get(location.uri(), tenant)
    if adapter is None:
        adapter = load_frozen(state, location, tenant=tenant)
        state.samplers.put(location.uri(), Resident(adapter=adapter, tenant=tenant))
    return adapter


def _shares(requests: dict[int, SampleRequest], num_ranks: int) -> list[list[int]]:
    """The requests of each rank: the costliest first, each to the rank with the least to do so far."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    costs = {index: len(one.prompt) + one.num_samples * one.max_tokens for index, one in requests.items()}
    for index in sorted(costs, key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(share) for share in shares]


def _run(state: EngineState, requests: dict[int, SampleRequest], jobs: Sequence[OpJob[Sample]]) -> _Answers:
    """Answers by index; this rank's work alone, nothing collective."""
    engine = SamplerEngine(base=state.base)
    pieces = {index: pieces_of(request, engine.limits) for index, request in requests.items()}
    for parts in pieces.values():
        for part in parts:
            engine.add(part)
    done: dict[int, Finished] = {}
    while engine.has_work():
        done |= {id(finished.request): finished for finished in engine.step()}
    answers: _Answers = {}
    for index, request in requests.items():
        finished = joined(request, [done[id(part)] for part in pieces[index]])
        targets = jobs[index].payload.target_prompt_logprobs
        answers[index] = to_wire(finished, targets=targets) if finished.error is None else failed(finished.error)
    return answers


def _gathered(state: EngineState, answers: _Answers) -> _Answers:
    """The answers of all ranks, on every rank; collective."""
    if state.comm.size == 1:
        return answers
    parts = state.comm.gather_bytes(msgspec.msgpack.encode(answers))
    decoder = msgspec.msgpack.Decoder(_Answers)
    merged: _Answers = {}
    for part in parts or []:
        merged |= decoder.decode(part)
    data = state.comm.broadcast_bytes(msgspec.msgpack.encode(merged) if parts is not None else None)
    return decoder.decode(data)
