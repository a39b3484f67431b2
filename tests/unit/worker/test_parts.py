"""Each setting of the engine and of the gang reaches the part that acts on it, and only that one."""

from operator import attrgetter
from pathlib import Path

import msgspec
import pytest

from gradstream.engine.config import DTypePolicy
from gradstream.shared.config import Settings, resolve
from gradstream.shared.config.machine import Machine
from gradstream.worker.parts import engine_config, lead_options, redis_url

MODEL = Path(__file__).parents[3] / "tests/models/tiny-qwen3-shakespeare"
# Field, another value than the default, the place it must reach, and what must be there.
ENGINE = [
    ("model_name", "else", "model_name", "else"),
    ("model_aliases", ["a", "b"], "model_aliases", ("a", "b")),
    ("tokenizer_id", "org/name", "tokenizer_id", "org/name"),
    ("max_context_tokens", 77, "max_context_tokens", 77),
    ("seed", 7, "seed", 7),
    ("device", "cuda", "device", "cuda"),
    ("torch_threads", 3, "torch_threads", 3),
    ("enable_mixed_precision", True, "dtype", DTypePolicy.BFLOAT16),
    ("enable_lora", False, "is_lora", False),
    ("lora_rank", 8, "default_rank", 8),
    ("lora_alpha", 8.0, "lora_alpha", 8.0),
    ("max_lora_rank", 64, "max_lora_rank", 64),
    ("output_dir", "/else", "output_dir", Path("/else")),
    ("storage_limit", 5, "storage_limit_bytes", 5),
    ("sample_packing_sequence_len", 64, "row_budget_tokens", 64),
    ("enable_packing", False, "row_budget_tokens", 1),
    ("load_weights_mode", "safetensors", "load_weights_mode", "safetensors"),
    ("init_device", "cpu", "init_device", "cpu"),
    ("ckpt_manager", "torch", "ckpt_manager", "torch"),
    ("load_checkpoint_path", "/else", "load_checkpoint_path", "/else"),
    ("attn_implementation", "eager", "attention", "reference"),
    ("rmsnorm_native", False, "numerics.rmsnorm_native", False),
    ("activation_native", False, "numerics.activation_native", False),
    ("rope_native", False, "numerics.rope_native", False),
    ("attention_cast_bf16", True, "numerics.attention_cast_bf16", True),
    ("merge_qkv", False, "numerics.merge_qkv", False),
    ("moe_implementation", "native", "numerics.moe_implementation", "native"),
    ("enable_compile", True, "numerics.enable_compile", True),
    ("ce_mode", "compiled", "numerics.ce_mode", "compiled"),
    ("enable_gradient_checkpointing", True, "memory.enable_gradient_checkpointing", True),
    ("enable_reentrant", True, "memory.enable_reentrant", True),
    ("enable_activation_offload", True, "memory.enable_activation_offload", True),
    ("basic_modules", ["Qwen3MLP"], "memory.basic_modules", ("Qwen3MLP",)),
    ("enable_self_test", True, "enable_self_test", True),
    ("freeze_router", False, "freeze_router", False),
    ("lora_target_modules", ["q_proj"], "lora_target_modules", ("q_proj",)),
    ("merge_lora_interval", 5, "merging.interval", 5),
    ("reset_optimizer_on_merge", True, "merging.resets_optimizer", True),
    ("max_merged_lora_rank", 64, "merging.max_rank", 64),
    ("log_gradient_norms", False, "log_gradient_norms", False),
    ("log_router_stats", False, "log_router_stats", False),
    ("max_active_adapters", 3, "max_active_adapters", 3),
    ("adapter_host_memory", 3, "adapter_host_memory_bytes", 3),
]
LEAD = [
    ("output_dir", "/else", "durability.joblog", Path("/else/joblog/main")),
    ("engine_name", "else", "durability.engine", "else"),
    ("storage_limit", 5, "storage_limit_bytes", 5),
    ("num_ranks", 2, "limits.running_jobs", 128),
    ("batch_budget_tokens", 99, "limits.batch_tokens", 99),
    ("batch_max_jobs", 3, "limits.batch_jobs", 3),
    ("max_active_adapters", 3, "limits.batch_models", 3),
    ("batch_isolation", "strict", "limits.is_strict", True),
    ("enable_packing", False, "limits.row_budget_tokens", 1),
    ("sample_packing_strategy", "best_fit", "limits.packing", "best_fit"),
    ("shared_prompt_tokens", 7, "limits.shared_prompt_tokens", 7),
    ("max_queued_bytes", 10, "read_ahead_bytes", 40),
    ("max_models_per_tenant", 3, "max_models_per_tenant", 3),
    ("max_job_deaths", 5, "max_job_deaths", 5),
    ("worker_connection_timeout", 9.0, "acquire_timeout_s", 9.0),
    ("operation_timeout_s", 9.0, "operation_timeout_s", 9.0),
    ("recovery", "tolerant", "durability.mode", "tolerant"),
    ("recovery_tolerance", 0.5, "durability.tolerance", 0.5),
    ("snapshot_replay_budget_s", 9.0, "durability.cadence.budget_s", 9.0),
    ("snapshot_idle_s", 9.0, "durability.cadence.idle_s", 9.0),
    ("snapshots_kept", 9, "durability.cadence.num_kept", 9),
    ("joblog_sync", "always", "durability.sync", "always"),
    ("joblog_segment_bytes", 9, "durability.segment_bytes", 9),
    ("joblog_retention_bytes", 9, "durability.retention_bytes", 9),
    ("joblog_retention_s", 9.0, "durability.retention_s", 9.0),
]

pytestmark = pytest.mark.config_field(
    "model_name", "model_aliases", "tokenizer_id", "max_context_tokens", "seed", "torch_threads", "enable_lora",
    "enable_mixed_precision", "lora_rank", "lora_alpha", "max_lora_rank", "output_dir", "sample_packing_sequence_len",
    "enable_packing", "engine_name", "batch_budget_tokens", "batch_max_jobs", "batch_isolation", "max_queued_bytes",
    "max_models_per_tenant", "max_job_deaths", "worker_connection_timeout", "operation_timeout_s", "recovery",
    "recovery_tolerance", "snapshot_replay_budget_s", "snapshot_idle_s", "snapshots_kept", "joblog_sync",
    "joblog_segment_bytes", "joblog_retention_bytes", "joblog_retention_s", "load_weights_mode",
    "max_active_adapters", "adapter_host_memory", "shared_prompt_tokens",
)  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    given = {"model_path": str(MODEL), "enable_lora": True, "output_dir": str(tmp_path), "redis_url": "redis://h"}
    written = msgspec.convert({**given, "explicit": sorted(given)}, Settings)
    return resolve(written, Machine(num_cores=2, has_cuda=False, cache_dir=tmp_path)).settings


@pytest.mark.parametrize(("field", "value", "place", "expected"), ENGINE, ids=[row[0] for row in ENGINE])
def test_a_setting_of_the_engine_reaches_it(settings, field, value, place, expected):
    before = engine_config(settings, model_path=MODEL)
    after = engine_config(msgspec.structs.replace(settings, **{field: value}), model_path=MODEL)

    assert attrgetter(place)(before) != expected
    assert attrgetter(place)(after) == expected


@pytest.mark.parametrize(("field", "value", "place", "expected"), LEAD, ids=[row[0] for row in LEAD])
def test_a_setting_of_the_gang_reaches_rank_0(settings, field, value, place, expected):
    before = lead_options(settings)
    after = lead_options(msgspec.structs.replace(settings, **{field: value}))

    assert attrgetter(place)(before) != expected
    assert attrgetter(place)(after) == expected


def test_a_gang_without_a_redis_is_a_mistake_of_who_started_it(settings):
    with pytest.raises(ValueError, match="redis_url is not set"):
        redis_url(msgspec.structs.replace(settings, redis_url=None))


def test_the_uri_of_a_checkpoint_to_start_from_is_a_directory_below_output_dir(settings):
    for text in ("xorl://default/weights/one", "tinker://default/weights/one"):
        given = msgspec.structs.replace(settings, load_checkpoint_path=text, output_dir="/else")
        found = engine_config(given, model_path=MODEL).load_checkpoint_path
        assert found == "/else/checkpoints/default/weights/one"
