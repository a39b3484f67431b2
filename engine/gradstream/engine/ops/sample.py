"""Continuations of prompts. New requests join those that run; each slice continues all of them by a bounded number of tokens."""

from collections.abc import Sequence

import msgspec

from gradstream.engine.adapters.adapter import FrozenAdapter
from gradstream.engine.checkpoint.location import Ephemeral, parse_uri
from gradstream.engine.checkpoint.shared import load_frozen
from gradstream.engine.files import mark_used
from gradstream.engine.memory import memory_as_failure
from gradstream.engine.ops.registry import OpJob
from gradstream.engine.sampler.answer import to_wire
from gradstream.engine.sampler.decoding import WHAT, Admitted, Slice
from gradstream.engine.sampler.intake import to_request
from gradstream.engine.sampler.request import Finished
from gradstream.engine.sampler.store import Resident
from gradstream.engine.state import EngineState
from gradstream.shared.errors import GradstreamError, OutOfMemory, Unsupported
from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.wire import Failed, Sample, SampleDone

_Answers = dict[FutureId, SampleDone | Failed]


def sample(state: EngineState, jobs: Sequence[OpJob[Sample]], *, num_steps: int) -> _Answers:
    """Admit the jobs, continue everything that runs by at most num_steps tokens (0: to the end), and answer what ended.

    The answers are those of these or of earlier jobs, the same on every rank; collective. A job may fail with InvalidRequest,
    UnknownModel, Unsupported, NonFinite, OutOfMemory or StorageFailure, which leaves the others as they are.
    """
    refused: _Answers = {}
    for job in jobs:
        try:
            _admit(state, job)
        except GradstreamError as error:
            refused[job.job.future_id] = Failed.of(error)
    ended: _Answers = {}
    for admitted, finished in _continued(state, num_steps=num_steps):
        ended[admitted.future_id] = (
            to_wire(finished, targets=admitted.targets) if finished.error is None else Failed.of(finished.error)
        )
    ended = _gathered(state, ended)
    for future_id in ended:
        state.decoding.settle(future_id)
    return refused | ended


def _continued(state: EngineState, *, num_steps: int) -> list[tuple[Admitted, Finished]]:
    """Those of this rank that ended; collective.

    If a rank has no room, idle adapters leave the device on all of them. If that was not enough, samples give way to each other there.
    """
    part = Slice(num_left=num_steps or None)

    def run() -> None:
        with memory_as_failure(state.comm, what=WHAT):
            state.decoding.run(part)

    try:
        state.with_room(run)
    except OutOfMemory:
        state.decoding.run_in_little_room(part)
    return part.ended


def _admit(state: EngineState, job: OpJob[Sample]) -> None:
    """Check a job and let it run; collective where the adapter has to be read. Raises Unsupported where full weights are trained."""
    if not state.config.is_lora:
        raise Unsupported(
            "sample: this server trains the full weights of its model and does not sample from them; save the weights and load them "
            "into an inference server"
        )
    path = job.payload.path
    adapter = None if path is None else _adapter(state, path, job.job.tenant)
    request = to_request(state, job.job, job.payload, adapter)
    state.decoding.admit(job.job.future_id, request, targets=job.payload.target_prompt_logprobs)


def _adapter(state: EngineState, path: str, tenant: TenantId) -> FrozenAdapter:
    location = parse_uri(path)
    if state.comm.is_leader and isinstance(location, Ephemeral):
        mark_used(location.directory(state.config.output_dir))
    adapter = state.samplers.get(location.uri(), tenant)
    if adapter is None:
        adapter = load_frozen(state, location, tenant=tenant)
        state.samplers.put(location.uri(), Resident(adapter=adapter, tenant=tenant))
    return adapter


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
