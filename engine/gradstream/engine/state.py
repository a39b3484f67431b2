"""What one rank holds between batches."""

from dataclasses import dataclass, field

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.budget import DiskBudget
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.checkpoint.start import Start
from gradstream.engine.config import EngineConfig
from gradstream.engine.models.base import BaseModel
from gradstream.engine.models.flat import FlatParameters
from gradstream.engine.models.full import FullModel
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.sampler.decoding import Decoding
from gradstream.engine.sampler.store import SamplerStore
from gradstream.shared.errors import InvalidRequest, UnknownModel, Unsupported
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import Job


@dataclass(slots=True, kw_only=True)
class EngineState:
    """The same on every rank after every batch. models: the trainable ones by id. samplers: frozen adapters.
    decoding: the samples that are running; they hold their own frozen adapters.

    disk is asked on rank 0 only, where saves are written. drafts: where rank 0 prepares them; None in a process that no other succeeds.
    start: the checkpoint that models begin with, None for the base weights and for fresh adapters.
    devices: what the ranks compute on, for the fingerprint.
    """

    config: EngineConfig
    comm: Comm
    base: BaseModel
    models: dict[ModelId, Adapter | FullModel] = field(default_factory=dict)
    samplers: SamplerStore = field(default_factory=SamplerStore)
    drafts: Drafts | None = None
    start: Start | None = None
    devices: str | None = None
    decoding: Decoding = field(init=False)
    disk: DiskBudget = field(init=False)

    def __post_init__(self) -> None:
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

    def held(self, job: Job) -> Adapter | FullModel:
        """The model that a job belongs to, asleep or not; raises UnknownModel when it is not here, or is another tenant's."""
        model = self.models.get(ModelId(job.owner))
        if model is None or model.tenant != job.tenant:
            raise UnknownModel(f"model {job.owner} is not held by this engine; it was never created, or was unloaded")
        return model

    def model(self, job: Job) -> Adapter | FullModel:
        """The same for work that needs the model on the device; raises also InvalidRequest when it is asleep."""
        model = self.held(job)
        if isinstance(model, FullModel) and model.is_asleep:
            raise InvalidRequest(
                f"model {job.owner} is asleep in host memory; call /wake_up, then repeat this {job.op}"
            )
        return model

    def adapter(self, job: Job) -> Adapter:
        """The same for what only adapters can do; raises also Unsupported on a server that trains full weights."""
        model = self.model(job)
        if not isinstance(model, Adapter):
            raise Unsupported(
                f"{job.op}: this server trains the full weights of its model, and this is for adapters only"
            )
        return model

    @property
    def flat(self) -> FlatParameters:
        """The base model's own weights, where these are trained."""
        assert self.base.flat is not None
        return self.base.flat
