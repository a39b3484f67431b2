"""GET /health: whether the engine is there, and what it is doing."""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from gradstream.api.auth import credential
from gradstream.api.parts import Parts, parts_of
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import LOCAL_TENANT, TenantId
from gradstream.shared.joblog.vitals import Vitals

router = APIRouter()
HEALTHY = "healthy"
_NO_QUEUE = "the queue cannot be reached"
_NO_WORKER = "no worker is running now; accepted jobs wait in the queue"
_STARTING = "a worker is starting, or brings its models back; accepted jobs wait in the queue"


class RedisHealth(BaseModel):
    reachable: bool


class RunningHealth(BaseModel):
    """The batch that is executed now. op: of its jobs. for_s: since when."""

    op: str
    num_jobs: int
    for_s: float


class WorkerHealth(BaseModel):
    """epoch: of the gang that leads. heartbeat_age_s: since its last sign of life."""

    epoch: int | None = None
    heartbeat_age_s: float | None = None
    num_ranks: int | None = None
    running: RunningHealth | None = None


class QueueHealth(BaseModel):
    """What was accepted and is not done."""

    jobs: int
    bytes: int


class ServerHealth(BaseModel):
    """active_requests: jobs without an outcome. total_requests: jobs ever accepted.

    A key of a tenant other than the machine's own sees its own active jobs and no totals; without a key there are no numbers at all.
    """

    status: str
    engine_running: bool
    active_requests: int | None = None
    total_requests: int | None = None
    redis: RedisHealth
    worker: WorkerHealth | None = None
    queue: QueueHealth | None = None
    detail: str | None = None


@router.get("/health", response_model=ServerHealth, responses={503: {"description": "no worker serves the queue now"}})
async def health(request: Request, response: Response) -> ServerHealth:
    """The state of queue and worker, healthy or with the reason why not; 503 unless healthy. Needs no key."""
    parts = parts_of(request)
    tenant = _tenant(parts, request)
    answer = await _health(parts, tenant)
    if answer.status != HEALTHY:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return answer


def _tenant(parts: Parts, request: Request) -> TenantId | None:
    """The tenant of the request's key, None when it has none that is known; the gate lets everybody come here."""
    if parts.keys is None:
        return LOCAL_TENANT
    key = credential(request.scope)
    return None if key is None else parts.keys.ring().tenant_of(key)


async def _health(parts: Parts, tenant: TenantId | None) -> ServerHealth:
    try:
        vitals = await parts.intake.vitals(tenant or LOCAL_TENANT)
        leading = await parts.intake.leading()
        num_ranks = (await parts.catalog.card()).num_ranks if leading is not None else None
    except Unavailable:
        return ServerHealth(status="error", engine_running=False, redis=RedisHealth(reachable=False), detail=_NO_QUEUE)
    reason = _NO_WORKER if vitals.epoch is None else _STARTING if leading is None else None
    answer = ServerHealth(
        status=HEALTHY if reason is None else "starting" if vitals.epoch is not None else "no_worker",
        engine_running=reason is None,
        redis=RedisHealth(reachable=True),
        detail=reason,
    )
    return answer.model_copy(update=_numbers(vitals, tenant, num_ranks))


def _numbers(vitals: Vitals, tenant: TenantId | None, num_ranks: int | None) -> dict[str, object]:
    """The fields of the answer that this tenant may see."""
    if tenant is None:
        return {}
    if tenant != LOCAL_TENANT:
        return {"active_requests": vitals.tenant_jobs}
    running = vitals.running
    return {
        "active_requests": vitals.num_jobs,
        "total_requests": vitals.num_accepted,
        "worker": WorkerHealth(
            epoch=vitals.epoch,
            heartbeat_age_s=vitals.heartbeat_age_s,
            num_ranks=num_ranks,
            running=running and RunningHealth(op=running.op, num_jobs=running.num_jobs, for_s=running.for_s),
        ),
        "queue": QueueHealth(jobs=vitals.num_jobs, bytes=vitals.num_bytes),
    }
