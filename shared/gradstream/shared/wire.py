"""Every type that crosses a process: job payloads, outcomes, the job itself and the batch.

A type changes only by adding a field with a default; golden bytes of old versions stay in the tests.
"""

from typing import Literal

import msgspec

from gradstream.shared.columns import Column
from gradstream.shared.errors import Category, GradstreamError
from gradstream.shared.ids import FutureId, ModelId, OwnerId, SamplerId, SessionId, TenantId
from gradstream.shared.targets import PromptTargets

WIRE_VERSION = 1
# The target of a token that is no target, as in torch's cross_entropy.
IGNORE = -100


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client asked of its adapter. seed None means: derived from the model id. alpha None: the server's lora_alpha.

    target_modules: last parts of the names of the modules that get an adapter, among those that the switches allow; None for all.
    """

    rank: int
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float | None = None
    target_modules: list[str] | None = None


class OptimizerSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model's optimizer, fixed for its life. dtype: of its state. What a step brings itself (AdamParams) is not here.

    momentum, dampening, nesterov: sgd. kahan: anyprecision_adamw keeps what the rounding of the weights lost. muon_*: muon, whose
    matrices learn at muon_lr while the rest learns by AdamW at the step's rate; muon_adjust_lr_fn None is "original". learning_rate: the
    base of muon_lr; with it the matrices learn at muon_lr times the step's rate over this one.
    """

    type: Literal["adamw", "anyprecision_adamw", "sgd", "muon"] = "adamw"
    dtype: Literal["fp32", "bf16"] = "fp32"
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    kahan: bool = True
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_nesterov: bool = True
    muon_ns_steps: int = 5
    muon_adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    learning_rate: float | None = None


class CreateModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="create_model"):
    """Make a model: a fresh adapter on the base model, or, with lora None, the base model's own weights to train.

    optimizer None: the engine's own. reduction: what optim_step makes of the accumulated gradient: its sum, or its sum divided by
    the valid tokens (those whose target is not IGNORE) accumulated with it. save_as: the name of a checkpoint of the untrained model,
    which is written where none of that name lies; None for none.
    """

    session_id: SessionId
    base_model: str
    lora: LoraSpec | None = None
    user_metadata: dict[str, str] | None = None
    optimizer: OptimizerSpec | None = None
    reduction: Literal["sum", "token_mean"] = "sum"
    save_as: str | None = None


class ForwardBackward(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="forward_backward"):
    """Loss of N datums, with gradients added to the model's accumulator when backward is true.

    tokens: int32 [T] per datum. inputs: the loss's arrays by name, each [T, ...] per datum, T equal to that of tokens. A token whose
    target is IGNORE has no loss and no gradient, and a log-probability of 0.0.
    """

    tokens: Column
    inputs: dict[str, Column]
    loss_fn: str
    loss_config: dict[str, float | str] = {}
    backward: bool = True


class AdamParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One AdamW step's hyper-parameters (decoupled weight decay); grad_clip_norm 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="optim_step"):
    """Apply the accumulated gradient once, then clear it."""

    adam: AdamParams


class SaveWeights(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="save_weights"):
    """Save adapter and optimizer as checkpoint tinker://{model}/weights/{name}."""

    name: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class LoadWeights(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="load_weights"):
    """Put a checkpoint's adapter into the model; with_optimizer also restores moments and step, else they start fresh.

    create is set when the job makes the model (then it is job seq 0); the adapter's LoraSpec comes from the checkpoint.
    """

    path: str
    with_optimizer: bool
    create: bool = False
    session_id: SessionId | None = None
    user_metadata: dict[str, str] | None = None


class SaveForSampler(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="save_weights_for_sampler"):
    """Freeze the adapter for sampling: named (a checkpoint) or, with sampler_id, ephemeral under that sampler.

    Exactly one of name and sampler_id is set.
    """

    name: str | None = None
    sampler_id: SamplerId | None = None
    session_id: SessionId | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class SaveExternal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="save_weights_external"):
    """Save the adapter alone, for download, as checkpoint tinker://{model}/external_weights/{name}."""

    name: str
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class ResetModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="reset_model"):
    """Forget the model's optimizer state, step and accumulated gradient; with weights, its weights too are those of its creation."""

    weights: bool = False


class OffloadModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="offload_model"):
    """Move the model to host memory (asleep) or back to the device. While it sleeps, its other jobs but the unload fail and change nothing."""

    asleep: bool


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="unload_model"):
    """Drop the model from the gang's memory."""


class DeleteCheckpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="delete_checkpoint"):
    """Delete a checkpoint's files and record. It runs beside its model's order, whether or not the model is loaded.

    created_ms: of the save that is meant, as a later one may have its name by then; 0 is whatever lies there.
    """

    path: str
    created_ms: int = 0


class CopyCheckpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="copy_checkpoint"):
    """Copy a checkpoint, its kind and name kept, into a run that holds nothing else. Job seq 0 of that run, which is never loaded.

    source and path: URIs. ttl_seconds: of the copy, from the moment it is made; the source's own is not taken over.
    """

    source: str
    path: str
    ttl_seconds: int | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """stop: None keeps EOS as the only stop; an empty list of ids and texts disables every stop."""

    max_tokens: int
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: list[int] | None = None
    stop_texts: list[str] | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sample"):
    """Continue one prompt num_samples times with a sampler's frozen weights.

    path: None samples the base model, else a tinker:// URI (named or ephemeral). prompt: int32 little-endian token ids.
    prompt_logprobs_last_n: prompt_logprobs and topk_prompt_logprobs are of the last n prompt tokens only; None: of all.
    prompt_alt_tokens_k: tokens to draw at every prompt position but the first.
    """

    path: str | None
    prompt: bytes
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: PromptTargets | None = None
    prompt_alt_tokens_k: int = 0


class RestoreSnapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="restore_snapshot"):
    """Put models of a snapshot into the gang's memory. Rank 0 makes this job itself at a take-over; no client can ask for it.

    directory: of the snapshot store, as rank 0 sees it. epoch, number: of the cut. model_ids: None for all of the cut's models.
    drop_others: models in memory that are not restored are forgotten.
    """

    directory: str
    epoch: int
    number: int
    model_ids: list[ModelId] | None = None
    drop_others: bool = False


Payload = (
    CreateModel
    | ForwardBackward
    | OptimStep
    | SaveWeights
    | LoadWeights
    | SaveForSampler
    | SaveExternal
    | UnloadModel
    | ResetModel
    | OffloadModel
    | Sample
    | DeleteCheckpoint
    | CopyCheckpoint
    | RestoreSnapshot
)


class CreateModelDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="create_model"):
    """path: of the checkpoint of the untrained model, if there was to be one."""

    model_id: ModelId
    path: str | None = None


class ForwardBackwardDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="forward_backward"):
    """outputs: per-datum arrays by name in submission order. metrics: names of the form `name:reduction`."""

    outputs: dict[str, Column]
    metrics: dict[str, float]
    backward: bool = True


class OptimStepDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="optim_step"):
    metrics: dict[str, float]


class SaveWeightsDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="save_weights"):
    path: str


class LoadWeightsDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="load_weights"):
    path: str
    model_id: ModelId


class SaveForSamplerDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="save_weights_for_sampler"):
    """path for a named checkpoint, sampler_id for an ephemeral one."""

    path: str | None = None
    sampler_id: SamplerId | None = None


class SaveExternalDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="save_weights_external"):
    """size_bytes: all files that a client downloads."""

    path: str
    size_bytes: int


class UnloadModelDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="unload_model"):
    model_id: ModelId


class ResetModelDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="reset_model"):
    model_id: ModelId


class OffloadModelDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="offload_model"):
    """bytes_moved: of weights, gradient and optimizer state together; 0 when the model was there already, or where host and device are one."""

    model_id: ModelId
    asleep: bool
    bytes_moved: int = 0


class DeleteCheckpointDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="delete_checkpoint"):
    """was_replaced: another save has the name, and keeps it and its record."""

    path: str
    was_replaced: bool = False


class CopyCheckpointDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="copy_checkpoint"):
    path: str


class RestoredModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """step: optimizer steps that the model had taken."""

    model_id: ModelId
    tenant: TenantId
    step: int


class RestoreSnapshotDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="restore_snapshot"):
    """failed: models that do not fit this engine, with the reason; they are not restored."""

    models: list[RestoredModel]
    failed: dict[ModelId, str] = {}


class TopK(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """k candidates at each of `length` positions, row-major: int32 ids and float32 logprobs, little-endian."""

    token_ids: bytes
    logprobs: bytes
    k: int
    length: int


class Sequence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """tokens int32 and logprobs float32, little-endian, one logprob per returned token (the stop token included)."""

    stop_reason: Literal["stop", "length"]
    tokens: bytes
    logprobs: bytes
    topk: TopK | None = None


class TargetLogprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """float32 little-endian, one for each cell of the PromptTargets with this shape and these indices; 0.0 for an id of -1."""

    logprobs: bytes
    shape: tuple[int, int]
    crow_indices: bytes | None = None
    col_indices: bytes | None = None


class SampleDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sample"):
    """prompt_logprobs: float32 [prompt length], NaN where not scored (always at position 0).

    alt_tokens: the draws at every prompt position but the first, length = prompt length - 1.
    """

    sequences: list[Sequence]
    prompt_logprobs: bytes | None = None
    topk_prompt: TopK | None = None
    target_prompt: TargetLogprobs | None = None
    alt_tokens: TopK | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="failed"):
    code: str
    category: Category
    message: str

    @classmethod
    def of(cls, error: GradstreamError) -> "Failed":
        """The outcome that says error."""
        return cls(code=error.code, category=error.category, message=error.message)


Done = (
    CreateModelDone
    | ForwardBackwardDone
    | OptimStepDone
    | SaveWeightsDone
    | LoadWeightsDone
    | SaveForSamplerDone
    | SaveExternalDone
    | UnloadModelDone
    | ResetModelDone
    | OffloadModelDone
    | SampleDone
    | DeleteCheckpointDone
    | CopyCheckpointDone
    | RestoreSnapshotDone
)
Outcome = Done | Failed


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One accepted request. payload is the msgpack of a Payload; it is decoded once on every rank.

    seq is the position in the owner's order for models, and only part of the future's id for samplers.
    """

    future_id: FutureId
    owner: OwnerId
    seq: int
    op: str
    tenant: TenantId
    payload: bytes
    num_tokens: int = 0
    v: int = WIRE_VERSION


class Plan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which jobs run together, in execution order, and the packing decisions that change floating-point bits.

    kind is the op that every job of the batch shares. row_budget_tokens bounds one forward pass; the rows that follow from it are
    a pure function of the jobs and the plan, so a replay with the same plan packs alike. isolate_jobs: no row holds datums of two
    jobs, so that a job's bits do not depend on what else was waiting.

    A `sample` batch lets its jobs, which may be none, join the samples that are running, and continues all of those by at most
    num_steps tokens; 0 continues them to their ends. The plan of a commit names the samples that ended, with num_steps 0: a sample's
    answer depends on nothing but its job, so a replay of that plan gives the same ones.

    packing: sequential fills one row after the other in submission order; best_fit puts each datum, longest first, where the least room is left.

    shared_prompt_tokens: datums of a job that begin with the same tokens, as many or more, have these computed once; 0: each for itself.
    """

    kind: str
    future_ids: list[FutureId]
    row_budget_tokens: int
    num_steps: int = 0
    isolate_jobs: bool = False
    packing: Literal["sequential", "best_fit"] = "sequential"
    shared_prompt_tokens: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Jobs executed together in one pass of the gang; what rank 0 broadcasts."""

    number: int
    epoch: int
    plan: Plan
    jobs: list[Job]
