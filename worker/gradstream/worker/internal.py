"""Jobs that a gang gives itself: they are in no log, and nobody waits for their futures."""

from gradstream.shared import codec
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, OwnerId, TenantId
from gradstream.shared.wire import Batch, Job, Payload, Plan

NOBODY = ModelId("gang")


def internal_batch(
    payload: Payload, *, future_id: FutureId, epoch: int, owner: OwnerId = NOBODY, tenant: TenantId = LOCAL_TENANT
) -> Batch:
    """A batch of one job with this payload; its outcome is the one of future_id."""
    job = Job(
        future_id=future_id,
        owner=owner,
        seq=0,
        op=codec.op_of(payload),
        tenant=tenant,
        payload=codec.encode(payload),
    )
    plan = Plan(kind=job.op, future_ids=[future_id], row_budget_tokens=1)
    return Batch(number=0, epoch=epoch, plan=plan, jobs=[job])
