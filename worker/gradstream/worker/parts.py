"""The server's settings as the small configurations of the worker's parts."""

import socket
from dataclasses import fields
from pathlib import Path

import msgspec

from gradstream.engine.checkpoint.start import place_of
from gradstream.engine.config import DTypePolicy, EngineConfig, Memory, Merging, Numerics
from gradstream.engine.optim.schedule import Decay, Schedule
from gradstream.shared.config import Settings
from gradstream.shared.wire import OptimizerSpec
from gradstream.worker.directories import joblog_dir, snapshots_dir
from gradstream.worker.gang import LeadOptions
from gradstream.worker.keeping import Durability
from gradstream.worker.pace import Cadence
from gradstream.worker.plan import Limits

# What the cache of one rank's sampler holds (`SamplerLimits`), with one sequence a job.
RUNNING_JOBS_PER_RANK = 64
RUNNING_TOKENS_PER_RANK = 131_072

_ATTENTION = {"eager": "reference", "sdpa": "segment_sdpa"}
# torch's own kernels: of variable length where there are some.
_NATIVE = {"cpu": "segment_sdpa", "cuda": "varlen"}


def redis_url(settings: Settings) -> str:
    """Where the job log is; the launcher has put the embedded server's address into the settings."""
    if settings.redis_url is None:
        raise ValueError(
            "redis_url is not set: the worker is started by the launcher, or with a settings file that has one"
        )
    return settings.redis_url


def engine_config(settings: Settings, *, model_path: Path) -> EngineConfig:
    """What the engine is told; the same on every rank."""
    return EngineConfig(
        model_path=model_path,
        model_name=settings.model_name or settings.model_path,
        model_aliases=tuple(settings.model_aliases),
        tokenizer_id=settings.tokenizer_id or str(model_path),
        output_dir=Path(settings.output_dir),
        lora_alpha=settings.lora_alpha,
        max_lora_rank=settings.max_lora_rank,
        seed=settings.seed,
        device=settings.device,
        dtype=DTypePolicy.BFLOAT16 if settings.enable_mixed_precision else DTypePolicy.FLOAT32,
        attention=_attention(settings),
        numerics=Numerics(**{field.name: getattr(settings, field.name) for field in fields(Numerics)}),
        memory=_memory(settings),
        config_path=_path(settings.config_path),
        tokenizer_path=_path(settings.tokenizer_path or settings.config_path),
        init_device=settings.init_device,
        load_weights_mode=settings.load_weights_mode,
        row_budget_tokens=row_budget_tokens(settings),
        torch_threads=settings.torch_threads,
        max_context_tokens=settings.max_context_tokens,
        storage_limit_bytes=settings.storage_limit,
        is_lora=settings.enable_lora,
        master_dtype=settings.master_dtype,
        freeze_router=settings.freeze_router,
        default_rank=settings.lora_rank,
        max_row_tokens=settings.sample_packing_sequence_len,
        optimizer=optimizer_spec(settings),
        schedule=_schedule(settings),
        merging=Merging(
            interval=settings.merge_lora_interval,
            resets_optimizer=settings.reset_optimizer_on_merge,
            max_rank=settings.max_merged_lora_rank,
        ),
        lora_target_modules=_tuple(settings.lora_target_modules),
        enable_self_test=settings.enable_self_test,
        log_gradient_norms=settings.log_gradient_norms,
        log_router_stats=settings.log_router_stats,
        ckpt_manager=settings.ckpt_manager,
        max_active_adapters=settings.max_active_adapters,
        adapter_host_memory_bytes=settings.adapter_host_memory,
        load_checkpoint_path=_start(settings),
    )


def _memory(settings: Settings) -> Memory:
    return Memory(
        enable_gradient_checkpointing=settings.enable_gradient_checkpointing,
        enable_reentrant=settings.enable_reentrant,
        enable_activation_offload=settings.enable_activation_offload,
        basic_modules=tuple(settings.basic_modules),
    )


def _tuple(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def optimizer_spec(settings: Settings) -> OptimizerSpec:
    """Of models whose creation names no optimizer."""
    spec = OptimizerSpec(type=settings.optimizer, dtype=settings.optimizer_dtype)
    if spec.type != "muon":
        return spec
    return msgspec.structs.replace(
        spec,
        muon_lr=settings.muon_lr,
        muon_momentum=settings.muon_momentum,
        muon_nesterov=settings.muon_nesterov,
        muon_ns_steps=settings.muon_ns_steps,
        muon_adjust_lr_fn=settings.muon_adjust_lr_fn,
    )


def _schedule(settings: Settings) -> Schedule | None:
    if settings.lr_schedule is None:
        return None
    return Schedule(
        decay=Decay(settings.lr_schedule),
        warmup_steps=settings.lr_warmup_steps,
        total_steps=settings.lr_total_steps,
        min_ratio=settings.lr_min_ratio,
    )


def _attention(settings: Settings) -> str:
    """The name of an attention back-end. Those of packages have the same name there as here."""
    name = settings.attn_implementation
    return _NATIVE[settings.device] if name == "native" else _ATTENTION.get(name, name)


def _start(settings: Settings) -> str:
    """The directory of the checkpoint to start from. A URI is of one below output_dir, wherever the engine itself works."""
    text = settings.load_checkpoint_path
    return str(place_of(text, Path(settings.output_dir))) if text else ""


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def row_budget_tokens(settings: Settings) -> int:
    """Tokens of one packed row. Without packing every datum fills a row of its own, since a row holds one at least."""
    return settings.sample_packing_sequence_len if settings.enable_packing else 1


def lead_options(settings: Settings) -> LeadOptions:
    """How rank 0 leads."""
    return LeadOptions(
        storage_limit_bytes=settings.storage_limit,
        owner=settings.lease_owner or socket.gethostname(),
        output_dir=Path(settings.output_dir),
        limits=Limits(
            batch_tokens=settings.batch_budget_tokens or settings.sample_packing_sequence_len,
            batch_jobs=settings.batch_max_jobs,
            batch_models=settings.max_active_adapters,
            row_budget_tokens=row_budget_tokens(settings),
            is_strict=settings.batch_isolation == "strict",
            packing=settings.sample_packing_strategy,
            shared_prompt_tokens=settings.shared_prompt_tokens,
            running_jobs=RUNNING_JOBS_PER_RANK * settings.num_ranks,
            running_tokens=RUNNING_TOKENS_PER_RANK * settings.num_ranks,
        ),
        # Payloads are stored compressed, tokens to about a quarter.
        read_ahead_bytes=4 * settings.max_queued_bytes,
        max_models_per_tenant=settings.max_models_per_tenant,
        durability=durability(settings),
        max_job_deaths=settings.max_job_deaths,
        acquire_timeout_s=settings.worker_connection_timeout,
        operation_timeout_s=settings.operation_timeout_s,
    )


def durability(settings: Settings) -> Durability:
    """How the log on disk and the snapshots are kept, and where."""
    output_dir = Path(settings.output_dir)
    return Durability(
        engine=settings.engine_name,
        joblog=joblog_dir(output_dir, settings.engine_name),
        snapshots=snapshots_dir(output_dir, settings.engine_name),
        mode=settings.recovery,
        tolerance=settings.recovery_tolerance,
        cadence=Cadence(
            budget_s=settings.snapshot_replay_budget_s,
            idle_s=settings.snapshot_idle_s,
            num_kept=settings.snapshots_kept,
        ),
        sync=settings.joblog_sync,
        segment_bytes=settings.joblog_segment_bytes,
        retention_bytes=settings.joblog_retention_bytes,
        retention_s=settings.joblog_retention_s,
    )
