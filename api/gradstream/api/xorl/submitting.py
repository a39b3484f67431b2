"""Jobs of xorl clients on their way into the queue, where the server numbers them."""

import msgspec
from fastapi import Response

from gradstream.api.budgets import check_model_room
from gradstream.api.encoding import Encoded, encoded
from gradstream.api.names import Target
from gradstream.api.parts import Parts
from gradstream.api.xorl.absence import missing
from gradstream.api.xorl.specs import ModelSpec, default_spec
from gradstream.shared import codec
from gradstream.shared.errors import SequenceConflict, Unavailable, UnknownModel
from gradstream.shared.ids import INITIAL_CHECKPOINT, FutureId
from gradstream.shared.joblog.port import RecordKind, Submission
from gradstream.shared.model_record import Dialect
from gradstream.shared.wire import Payload

# The first look may only find out since when the gang leads that leads now; the second one then counts.
_NUM_LOOKS = 2


def digest_of(raw: bytes) -> str:
    """What tells a request from others with its seq_id: of its payload or, where the same request may give another payload, of its body."""
    return codec.digest(raw)


async def submit(
    parts: Parts, target: Target, payload: Payload | Encoded, *, seq_id: int | None, request_digest: str = ""
) -> FutureId:
    """The future of a job behind everything that the model has accepted. Raises UnknownModel, QueueFull, Unavailable."""
    job = payload if isinstance(payload, Encoded) else encoded(payload)
    submission = Submission(
        owner=target.model,
        seq=None,
        op=job.op,
        tenant=target.tenant,
        payload=job.payload,
        num_tokens=job.num_tokens,
        packed=job.packed,
        retry_key="" if seq_id is None else str(seq_id),
        retry_digest=request_digest,
    )
    for _ in range(_NUM_LOOKS):
        start_s = parts.clock.monotonic_s()
        try:
            return (await parts.admission.submit(submission)).future_id
        except UnknownModel as error:
            if await parts.recovery.is_settled(start_s):
                if target.is_default:
                    break
                raise await missing(parts, target) from error
    else:
        raise _doubtful(target)
    await create(parts, target, default_spec(await parts.catalog.card()))
    return (await parts.admission.submit(submission)).future_id


def _doubtful(target: Target) -> Unavailable:
    return Unavailable(
        f"model_id: the server is recovering: whether there is a model {target.name!r} is not known yet; ask again in a few seconds"
    )


async def _check_absence(parts: Parts, target: Target) -> None:
    """Raise Unavailable when a model that is not found may be there once the server has recovered: it must not be made anew."""
    for _ in range(_NUM_LOOKS):
        start_s = parts.clock.monotonic_s()
        is_there = await parts.intake.record(RecordKind.MODEL, target.model) is not None
        if is_there or await parts.recovery.is_settled(start_s):
            return
    raise _doubtful(target)


async def create(parts: Parts, target: Target, spec: ModelSpec, *, seq_id: int | None = None) -> FutureId | None:
    """The future of the job that makes a model; None when there is one of this name already.

    Raises BudgetExceeded, QueueFull, Unavailable.
    """
    await _check_absence(parts, target)
    await check_model_room(parts, target.model, tenant=target.tenant)
    save_as = None if parts.config.skip_initial_checkpoint else INITIAL_CHECKPOINT
    payload = spec.payload(session=target.model, save_as=save_as)
    submission = Submission(
        owner=target.model,
        seq=None,
        op=codec.op_of(payload),
        tenant=target.tenant,
        payload=codec.encode(payload),
        retry_key="" if seq_id is None else str(seq_id),
        model_record={
            **spec.record(),
            "dialect": Dialect.XORL,
            "name": target.name,
            "session": target.model,
            "tenant": target.tenant,
            "user_metadata": "{}",
            "created_ms": str(parts.clock.wall_ms()),
        },
    )
    try:
        return (await parts.admission.submit(submission)).future_id
    except SequenceConflict:
        return None


class Promised(Response):
    """The answer to an accepted request: the future to poll."""

    media_type = "application/json"


def promised(target: Target, future_id: FutureId) -> Promised:
    """{request_id, model_id}."""
    return Promised(msgspec.json.encode({"request_id": future_id, "model_id": target.name}))
