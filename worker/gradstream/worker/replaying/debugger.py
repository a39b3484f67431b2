"""The Python debugger, stopped right before a batch of the log runs."""

import bdb
import pdb
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.engine import Engine
from gradstream.engine.models.full import FullModel
from gradstream.shared import codec
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.wire import Batch, Job, Outcome, Payload
from gradstream.worker.recovery.replay import PastBatch
from gradstream.worker.replaying.errors import Stopped
from gradstream.worker.replaying.runner import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """A job as the debugger shows it. payload: decoded, None when it does not read. recorded: what came out then."""

    job: Job
    payload: Payload | None
    recorded: Outcome


def run_in_debugger(
    engine: Engine, past: PastBatch, batch: Batch, run: Run, *, at: FutureId, quiet_stdout: bool
) -> Mapping[FutureId, Outcome]:
    """Run a batch under pdb, which reads its commands from stdin. Raises Stopped when the user quits.

    quiet_stdout: the debugger writes to stderr, since stdout is for what the command prints.
    """
    job = next((ended.job for ended in past.ended if ended.job.future_id == at), past.ended[0].job)
    models, owner = engine.state.models, ModelId(job.owner)
    jobs = [
        LoggedRun(job=ended.job, payload=_payload(ended.job), recorded=codec.decode_outcome(ended.data))
        for ended in past.ended
    ]
    debugger = pdb.Pdb(stdout=sys.stderr) if quiet_stdout else pdb.Pdb()
    try:
        # As in the batch itself: the model that is shown is the one that the batch changes.
        with models.batch([owner]):
            model = None if models.peek(owner) is None else models[owner]
            return _stopped(debugger, engine, model, batch, jobs, run)
    except bdb.BdbQuit as error:
        raise Stopped from error


def _stopped(
    debugger: pdb.Pdb,
    engine: Engine,  # noqa: ARG001 - a name that the user finds in scope, as the next ones
    model: Adapter | FullModel | None,  # noqa: ARG001
    batch: Batch,
    jobs: list[LoggedRun],  # noqa: ARG001
    run: Run,
) -> Mapping[FutureId, Outcome]:
    """engine, model (the adapter, or the full-weight model), batch, jobs are in scope; `next` runs the batch and `step` goes into it, then outcomes is there."""
    debugger.set_trace()
    outcomes = run(batch)
    return outcomes  # noqa: RET504 - a line to stop at when outcomes is known


def _payload(job: Job) -> Payload | None:
    try:
        return codec.decode_payload(job.payload)
    except InvalidRequest:
        return None
