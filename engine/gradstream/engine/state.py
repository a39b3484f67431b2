"""What one rank holds between batches."""

from dataclasses import dataclass, field

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.budget import DiskBudget
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.config import EngineConfig
from gradstream.engine.models.base import BaseModel
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.sampler.decoding import Decoding
from gradstream.engine.sampler.store import SamplerStore
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import Job


@dataclass(slots=True, kw_only=True)
class EngineState:
    """The same on every rank after every batch. models: the trainable ones by id. samplers: frozen adapters.
    decoding: the samples that are running; they hold their own frozen adapters.

    disk is asked on rank 0 only, where saves are written. drafts: where rank 0 prepares them; None in a process that no other succeeds.
    """

    config: EngineConfig
    comm: Comm
    base: BaseModel
    models: dict[ModelId, Adapter] = field(default_factory=dict)
    samplers: SamplerStore = field(default_factory=SamplerStore)
    drafts: Drafts | None = None
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

    def model(self, job: Job) -> Adapter:
        """The model that a job belongs to; raises UnknownModel when it is not here, or is another tenant's."""
        adapter = self.models.get(ModelId(job.owner))
        if adapter is None or adapter.tenant != job.tenant:
            raise UnknownModel(f"model {job.owner} is not held by this engine; it was never created, or was unloaded")
        return adapter
