"""The training engine of one rank: open it, ask what it offers, let it execute batches."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gradstream.engine import ops
from gradstream.engine.adapters.layout import module_names, unknown_modules
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.checkpoint.start import find_start
from gradstream.engine.config import EngineConfig
from gradstream.engine.losses._base import LOSSES, REFUSED
from gradstream.engine.models.base import BaseModel
from gradstream.engine.models.build import Build, load_base
from gradstream.engine.numerics import configure, device_names, fingerprint, master_dtype, resolve_dtype
from gradstream.engine.ops.registry import OPS, OpJob
from gradstream.engine.ops.sample import sample
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.products import bound_kernels
from gradstream.engine.registry import import_siblings
from gradstream.engine.residency.files import PARKED, remove_left
from gradstream.engine.self_test import self_test
from gradstream.engine.snapshot.capture import capture
from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.state import EngineState
from gradstream.shared.allocator import keep_freed_memory
from gradstream.shared.catalog import EngineCard
from gradstream.shared.codec import decode_payload
from gradstream.shared.errors import GradstreamError, InvalidRequest, Unsupported
from gradstream.shared.ids import FutureId, ModelId, TenantId
from gradstream.shared.wire import Batch, Failed, Outcome, Payload

import_siblings(ops)


class Engine:
    """Executes batches. Every rank calls execute with the same batches in the same order."""

    def __init__(self, state: EngineState) -> None:
        self.state = state

    @classmethod
    def open(cls, config: EngineConfig, comm: Comm) -> "Engine":
        """Load the base model; raises Unsupported when it, or the checkpoint to start from, cannot be served."""
        configure(config)
        keep_freed_memory()
        bound_kernels()
        start = find_start(config, comm)
        device = torch.device(config.device)
        base = load_base(
            config.model_path,
            device=device,
            dtype=resolve_dtype(config.dtype, device),
            build=Build.of(config),
        )
        if config.is_lora:
            _check_modules(config, base)
        else:
            master_dtype(config, base)
        devices = device_names(config, comm)
        remove_left(config.output_dir / PARKED)
        engine = cls(EngineState(config=config, comm=comm, base=base, start=start, devices=devices))
        if config.enable_self_test:
            self_test(engine.state)
        return engine

    def card(self, *, epoch: int) -> EngineCard:
        """What the API may tell clients about this engine."""
        state = self.state
        modules = state.config.lora_target_modules
        return EngineCard(
            model_name=state.config.model_name,
            model_aliases=list(state.config.model_aliases),
            tokenizer_id=state.config.tokenizer_id,
            architecture=state.base.facts.architecture,
            vocab_size=state.base.vocab_size,
            max_context_tokens=state.max_context_tokens,
            max_lora_rank=state.config.max_lora_rank,
            num_ranks=state.comm.size,
            epoch=epoch,
            fingerprint=fingerprint(state.config, state.base, state.comm, start=state.start, devices=state.devices),
            losses=[loss.card for loss in LOSSES.values()],
            refused_losses={name: REFUSED[name] for name in REFUSED},
            is_lora=state.config.is_lora,
            default_rank=state.config.default_rank,
            default_alpha=state.config.lora_alpha,
            optimizer=state.config.optimizer,
            max_row_tokens=state.config.max_row_tokens,
            default_modules=None if modules is None else list(modules),
        )

    def models(self) -> dict[ModelId, TenantId]:
        """The models that are held, and whose they are."""
        return self.state.models.tenants()

    def capture(self, model_ids: Iterable[ModelId]) -> list[ModelState]:
        """Copies of these models for a snapshot; not collective. Raises UnknownModel when one is not here."""
        return capture(self.state, model_ids)

    def prepare_saves_in(self, drafts: Drafts) -> None:
        """On rank 0 of a gang, before its first batch: where saves are prepared, so that a successor can take that away."""
        self.state.drafts = drafts

    def execute(self, batch: Batch) -> dict[FutureId, Outcome]:
        """One outcome for each job of the batch; its jobs share one op.

        Samples are the exception: a batch of them (none, perhaps) joins the samples that run, and the outcomes are of those that
        ended within the plan's num_steps, whichever batch brought them.

        A job's own error is its Failed outcome and leaves the state as it was before the job. Anything else is raised: the state
        can no longer be trusted, and the process must end.
        """
        decoded = [_decode(job.payload) for job in batch.jobs]
        # Any: the payload types are told apart by the ops.
        jobs: list[OpJob[Any]] = [
            OpJob(job, payload, batch.plan)
            for job, payload in zip(batch.jobs, decoded, strict=True)
            if not isinstance(payload, GradstreamError)
        ]
        outcomes: dict[FutureId, Outcome] = {
            job.future_id: Failed.of(payload)
            for job, payload in zip(batch.jobs, decoded, strict=True)
            if isinstance(payload, GradstreamError)
        }
        if batch.plan.kind == "sample":
            return outcomes | sample(self.state, jobs, num_steps=batch.plan.num_steps)
        served = zip(jobs, self._serve(jobs), strict=True)
        return outcomes | {job.job.future_id: outcome for job, outcome in served}

    def _serve(self, jobs: Sequence[OpJob[Any]]) -> list[Outcome]:  # Any: the payload types are told apart here
        if not jobs:
            return []
        kinds = {type(job.payload) for job in jobs}
        assert len(kinds) == 1, f"a batch mixes {sorted(kind.__name__ for kind in kinds)}"
        with self.state.models.batch([ModelId(job.job.owner) for job in jobs]):
            outcomes = OPS[kinds.pop()](self.state, jobs)
        assert len(outcomes) == len(jobs)
        return outcomes


def _check_modules(config: EngineConfig, base: BaseModel) -> None:
    names = config.lora_target_modules
    if names is None:
        return
    unknown = unknown_modules(base.sites, names)
    if unknown or not names:
        raise Unsupported(
            f"lora_target_modules: {', '.join(unknown) or 'an empty list'}; modules of {base.facts.architecture} that can have an "
            f"adapter are {', '.join(module_names(base.sites))}"
        )


def _decode(data: bytes) -> Payload | InvalidRequest:
    try:
        return decode_payload(data)
    except InvalidRequest as error:
        return error
