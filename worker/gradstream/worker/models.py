"""Which models this gang holds in memory, and the honest answer to jobs of those that it does not."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from gradstream.shared.errors import BudgetExceeded, GradstreamError, ModelLost, ServerError, UnknownModel
from gradstream.shared.ids import ModelId, TenantId
from gradstream.shared.wire import Failed, Job, Outcome, UnloadModelDone
from gradstream.worker.records import is_creator


class Models:
    """Decides for each job whether the engine can serve it. Learns from outcomes what lives in the engine.

    lost: models of earlier epochs. last_checkpoint gives the URI of a model's newest training checkpoint, or None.
    max_per_tenant: how many models of one tenant the engine holds at a time. live: models that were recovered. max_deaths: a job that
    was running at the death of this many gangs is the likely cause, and is not tried again.
    """

    def __init__(
        self,
        *,
        lost: Collection[ModelId],
        last_checkpoint: Callable[[ModelId], str | None],
        max_per_tenant: int = 256,
        live: Mapping[ModelId, TenantId] | None = None,
        max_deaths: int = 2,
    ) -> None:
        self._lost = set(lost)
        self._last_checkpoint = last_checkpoint
        self._max_per_tenant = max_per_tenant
        self._max_deaths = max_deaths
        self._live: dict[str, TenantId] = {str(model): tenant for model, tenant in (live or {}).items()}
        self._num_of: Counter[TenantId] = Counter(self._live.values())
        self._failed: dict[str, str] = {}

    @property
    def live(self) -> Collection[ModelId]:
        """The models in memory."""
        return [ModelId(model) for model in self._live]

    def is_deadly(self, starts: int) -> bool:
        """True when a job that was running at the death of so many gangs is set aside."""
        return starts >= self._max_deaths

    def answer(self, job: Job, *, starts: int) -> Outcome | None:
        """The outcome of a job that must not reach the engine, None for one that may.

        starts: how often earlier gangs had started the job and died before its outcome.
        """
        if starts >= self._max_deaths:
            return Failed.of(
                ServerError(
                    f"this {job.op} was set aside: the worker died {starts} times while running it; the worker's log says why"
                )
            )
        if not job.payload:
            return Failed.of(ServerError(f"the body of this {job.op} is gone from Redis; submit it as a new request"))
        if is_creator(job):
            return self._crowded(job)
        if job.op == "sample" or self._live.get(job.owner) == job.tenant:
            return None
        if job.op == "unload_model" and job.owner not in self._live:
            return UnloadModelDone(model_id=ModelId(job.owner))
        return Failed.of(self._absence(ModelId(job.owner)))

    def learn(self, job: Job, outcome: Outcome) -> None:
        """Take in what an executed job changed."""
        if is_creator(job):
            if isinstance(outcome, Failed):
                self._failed[job.owner] = outcome.message
            else:
                self._lost.discard(ModelId(job.owner))
                self._failed.pop(job.owner, None)
                self._live[job.owner] = job.tenant
                self._num_of[job.tenant] += 1
        elif isinstance(outcome, UnloadModelDone):
            if (tenant := self._live.pop(job.owner, None)) is not None:
                self._num_of[tenant] -= 1
            self._failed.pop(job.owner, None)

    def _crowded(self, job: Job) -> Outcome | None:
        """The refusal of a model beyond its tenant's number, None when there is room."""
        if self._num_of[job.tenant] < self._max_per_tenant:
            return None
        return Failed.of(
            BudgetExceeded(
                f"{self._max_per_tenant} models of this tenant are loaded, as many as it may have; "
                "unload one, or finish a session that has some"
            )
        )

    def _absence(self, model: ModelId) -> GradstreamError:
        if model in self._lost:
            return ModelLost(_lost_message(model, self._last_checkpoint(model)))
        if model in self._failed:
            return UnknownModel(f"model {model} could not be created: {self._failed[model]}")
        return UnknownModel(f"model {model} is not loaded: it was unloaded or never created; create a new model")


def _lost_message(model: ModelId, checkpoint: str | None) -> str:
    start = f"the training state of model {model} was lost when its worker stopped"
    if checkpoint is None:
        return f"{start}, and no weights had been saved; create a new model and start over"
    return f"{start}; create a new model from its last checkpoint {checkpoint}, and repeat what came after it"
