"""What one rank holds between batches."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.budget import DiskBudget
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.checkpoint.start import Start
from gradstream.engine.config import EngineConfig
from gradstream.engine.memory import room_for_adapter
from gradstream.engine.models.base import BaseModel
from gradstream.engine.models.flat import FlatParameters
from gradstream.engine.models.full import FullModel
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.residency.files import PARKED, ParkingPlace
from gradstream.engine.residency.parked import ParkedModel
from gradstream.engine.residency.table import Bounds, ModelTable
from gradstream.engine.sampler.decoding import Decoding
from gradstream.engine.sampler.store import SamplerStore
from gradstream.shared.errors import InvalidRequest, OutOfMemory, UnknownModel, Unsupported
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import Job

Made = TypeVar("Made")


@dataclass(slots=True, kw_only=True)
class EngineState:
    """The same on every rank after every batch. models: the trainable ones by id, on the device or not. samplers: frozen adapters.
    decoding: the samples that are running; they hold their own frozen adapters.

    disk is asked on rank 0 only, where saves are written. drafts: where rank 0 prepares them; None in a process that no other succeeds.
    start: the checkpoint that models begin with, None for the base weights and for fresh adapters.
    devices: what the ranks compute on, for the fingerprint.
    """

    config: EngineConfig
    comm: Comm
    base: BaseModel
    samplers: SamplerStore = field(default_factory=SamplerStore)
    drafts: Drafts | None = None
    start: Start | None = None
    devices: str | None = None
    models: ModelTable = field(init=False)
    decoding: Decoding = field(init=False)
    disk: DiskBudget = field(init=False)

    def __post_init__(self) -> None:
        self.models = ModelTable(
            device=self.base.device,
            bounds=Bounds(max_active=self.config.max_active_adapters, host_bytes=self.config.adapter_host_memory_bytes),
            place=ParkingPlace(self.config.output_dir / PARKED),
        )
        self.decoding = Decoding(base=self.base, rank=self.comm.rank, num_ranks=self.comm.size)
        self.disk = DiskBudget(self.config.output_dir, limit_bytes=self.config.storage_limit_bytes)

    @property
    def base_names(self) -> tuple[str, ...]:
        """Every name of the base model, the main one first."""
        return (self.config.model_name, *self.config.model_aliases)

    @property
    def max_context_tokens(self) -> int:
        """The longest sequence that one datum, or prompt and answer, may have."""
        limit = self.config.max_context_tokens
        return self.base.facts.max_position if limit is None else min(limit, self.base.facts.max_position)

    def held(self, job: Job) -> Adapter | FullModel | ParkedModel:
        """The model that a job belongs to, wherever it is; raises UnknownModel when it is not here, or is another tenant's."""
        model = self.models.peek(ModelId(job.owner))
        if model is None or model.tenant != job.tenant:
            raise UnknownModel(f"model {job.owner} is not held by this engine; it was never created, or was unloaded")
        return model

    def model(self, job: Job) -> Adapter | FullModel:
        """The same for work that needs the model on the device, where it stays until the batch is over; collective.

        Raises also InvalidRequest when it is asleep, and OutOfMemory, on every rank, when one has no room for it.
        """
        model = self.held(job)
        if isinstance(model, FullModel) and model.is_asleep:
            raise InvalidRequest(
                f"model {job.owner} is asleep in host memory; call /wake_up, then repeat this {job.op}"
            )
        if isinstance(model, ParkedModel):
            self._bring(model.model_id, what=job.op)
        return self.models[model.model_id]

    def adapter(self, job: Job) -> Adapter:
        """The same for what only adapters can do; raises also Unsupported on a server that trains full weights."""
        model = self.model(job)
        if not isinstance(model, Adapter):
            raise Unsupported(
                f"{job.op}: this server trains the full weights of its model, and this is for adapters only"
            )
        return model

    def _bring(self, model_id: ModelId, *, what: str) -> None:
        """Bring a model to the device; if need be all others that are not in use leave it."""

        def bring() -> None:
            with room_for_adapter(self.comm, what=what):
                self.models.bring(model_id)

        self.with_room(bring)

    def with_room(self, work: Callable[[], Made]) -> Made:
        """What the work makes. If it finds no room, adapters that the batch does not use leave the device, and it is tried once more.

        Collective: the work raises OutOfMemory, on every rank alike, with all as it was. That is raised when it happens again, or when no
        adapter can leave; those not in use have left the device then.
        """
        # Asked beforehand: work may have brought a model on one rank and found no room on another.
        can_leave = self.models.has_unused or self.samplers.has_other(self.decoding.holds)
        try:
            return work()
        except OutOfMemory as error:
            failure = _bare(error)
        # After the block above, in which the failed work's frames, and so its tensors, are still held.
        self._shed()
        if not can_leave:
            raise failure
        try:
            return work()
        except OutOfMemory as error:
            failure = _bare(error)
        self._shed()
        raise failure

    def _shed(self) -> None:
        """Let adapters leave the device: trained ones that the batch has not used, frozen ones that no running sample has."""
        self.samplers.keep(self.decoding.holds)
        self.models.shed()

    @property
    def flat(self) -> FlatParameters:
        """The base model's own weights, where these are trained."""
        assert self.base.flat is not None
        return self.base.flat


def _bare(error: OutOfMemory) -> OutOfMemory:
    """The error without the frames that it came through."""
    error.__context__ = None
    return error.with_traceback(None)
