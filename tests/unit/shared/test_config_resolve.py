"""What becomes of a config on a machine: refusals, adapted defaults, derived values."""

from collections.abc import Collection
from pathlib import Path

import msgspec
import pytest

from gradstream.shared.config import ConfigError, Resolved, Settings, resolve
from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.support import ZMQ, supported_values

ROOT = Path(__file__).parents[3]
PACKAGES = ("flash_attn_interface", "flash_attn.cute")
MODEL = str(ROOT / "tests/models/tiny-qwen3-shakespeare")


def machine(tmp_path: Path, *, has_cuda: bool = False, lacks: Collection[str] = ()) -> Machine:
    return Machine(num_cores=8, has_cuda=has_cuda, cache_dir=tmp_path, lacks=frozenset(lacks))


def resolved(tmp_path: Path, *, has_cuda: bool = False, lacks: Collection[str] = (), **values: object) -> Resolved:
    given = {"model_path": MODEL, "enable_lora": True, **values}
    settings = msgspec.convert({**given, "explicit": sorted(given)}, Settings)
    return resolve(settings, machine(tmp_path, has_cuda=has_cuda, lacks=lacks))


def refusal(tmp_path: Path, *, has_cuda: bool = False, lacks: Collection[str] = (), **values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, has_cuda=has_cuda, lacks=lacks, **values)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_after_resolving_every_value_is_one_that_exists(tmp_path: Path) -> None:
    for has_cuda in (False, True):
        settings = resolved(tmp_path, has_cuda=has_cuda).settings
        for name, only in supported_values(settings.device).items():
            assert getattr(settings, name) in only.values, name


def test_every_adapted_default_is_said_and_nothing_else(tmp_path: Path) -> None:
    result = resolved(tmp_path)
    # These are filled in, not replaced.
    filled = {
        "model_name",
        "tokenizer_id",
        "device",
        "output_dir",
        "redis_data_dir",
        "torch_threads",
        "batch_budget_tokens",
    }
    changed = {
        name
        for name, field in FIELDS.items()
        if name not in result.settings.explicit and getattr(result.settings, name) != field.default
    }
    assert {notice.field for notice in result.notices} == changed - filled


@pytest.mark.parametrize("name", sorted(supported_values("cpu")))
def test_a_default_that_exists_can_be_written_out(tmp_path: Path, name: str) -> None:
    for value in supported_values("cpu")[name].values:
        assert getattr(resolved(tmp_path, **{name: value}).settings, name) == value


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("muon_lr", 0.1, "muon_lr: 0.1 belongs to optimizer: muon, and optimizer is adamw"),
        ("muon_nesterov", False, "muon_nesterov: false belongs to optimizer: muon, and optimizer is adamw"),
        ("lr_min_ratio", 0.1, "lr_min_ratio: 0.1 belongs to lr_schedule, which is null"),
        ("lr_schedule", "cosine", "lr_total_steps: null must be above lr_warmup_steps, 0, for lr_schedule cosine"),
        ("attn_implementation", "flash_attention_3", "attn_implementation: flash_attention_3 cannot run on a CPU; use sdpa or eager or native"),
        ("master_dtype", "bf16", "master_dtype: bf16 is of full-weight training, and enable_lora is true; use fp32"),
        ("tensor_parallel_size", 2, "tensor_parallel_size: 2 asks for tensor parallelism, which does not exist yet; use 1"),
        ("data_parallel_mode", "fsdp2", "data_parallel_mode: fsdp2 asks for a sharded model, which does not exist yet; use ddp or none"),
        ("enable_reentrant", True, "enable_reentrant: true is a kind of gradient checkpointing; set enable_gradient_checkpointing: true, or use false"),
        ("freeze_router", False, "freeze_router: false trains routers, and adapters have no place there; use true, or enable_lora: false"),
        ("enable_activation_offload", True, "enable_activation_offload: true moves activations to CPU memory, and on a CPU they are there; use false"),
        ("reset_optimizer_on_merge", True, "reset_optimizer_on_merge: true belongs to merge_lora_interval, which is 0; use false, or set it"),
        ("device", "cuda", "device: 'cuda' needs an NVIDIA GPU and a torch built for it; use cpu or auto"),
        ("load_checkpoint_path", "else/where", "load_checkpoint_path: else/where has no manifest.json; it must be a checkpoint's directory, or a URI of the form tinker://MODEL/weights/NAME or xorl://MODEL/weights/NAME"),
        ("load_checkpoint_path", "xorl://m/sampler_weights/n", "load_checkpoint_path: xorl://m/sampler_weights/n has no manifest.json; it must be a checkpoint's directory, or a URI of the form tinker://MODEL/weights/NAME or xorl://MODEL/weights/NAME"),
        ("config_path", "else/where", "config_path: else/where has no config.json; it must be a Hugging Face directory on this machine"),
        ("router_fp32", False, "router_fp32: false asks for less than float32 where everything is computed in float32; use true"),
        ("init_device", "cuda", "init_device: cuda needs a GPU; use meta or cpu"),
        ("restart_backoff_s", 60.0, "restart_backoff_s: 60.0 is above max_restart_backoff_s: 30.0, the longest pause"),
        ("tokenizer_path", "else/where", "tokenizer_path: else/where has no tokenizer.json; it must be a Hugging Face directory on this machine"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_had_is_refused_in_a_sentence(
    tmp_path: Path, field: str, value: object, sentence: str
) -> None:
    assert refusal(tmp_path, **{field: value}) == sentence


def test_full_weights_are_trained_when_nobody_asks_for_adapters(tmp_path: Path) -> None:
    assert not resolve(Settings(model_path=MODEL), machine(tmp_path)).settings.enable_lora


def test_weights_without_a_float32_copy_need_bfloat16(tmp_path: Path) -> None:
    full = {"enable_lora": False, "master_dtype": "bf16"}
    assert refusal(tmp_path, **full) == "master_dtype: bf16 needs enable_mixed_precision: true; use fp32"
    assert resolved(tmp_path, **full, enable_mixed_precision=True).settings.master_dtype == "bf16"


@pytest.mark.config_field("merge_lora_interval", "reset_optimizer_on_merge", "max_merged_lora_rank")
def test_merges_are_of_adapters_and_have_room_for_one(tmp_path: Path) -> None:
    assert refusal(tmp_path, enable_lora=False, merge_lora_interval=10) == (
        "merge_lora_interval: 10 merges LoRA adapters, and enable_lora is false, which trains the full weights themselves; use 0"
    )
    assert refusal(tmp_path, merge_lora_interval=10, max_merged_lora_rank=63) == (
        "max_merged_lora_rank: 63 has no room for one merge of lora_rank: 32; use 64 or more"
    )
    settings = resolved(tmp_path, merge_lora_interval=10, reset_optimizer_on_merge=True).settings
    assert (settings.merge_lora_interval, settings.reset_optimizer_on_merge) == (10, True)


def test_adapters_keep_fp32_optimizer_state_unless_bf16_is_written(tmp_path: Path) -> None:
    assert resolved(tmp_path).settings.optimizer_dtype == "fp32"
    assert resolved(tmp_path, optimizer_dtype="bf16").settings.optimizer_dtype == "bf16"
    assert resolved(tmp_path, enable_lora=False).settings.optimizer_dtype == "bf16"
    assert resolved(tmp_path, enable_lora=False, optimizer_dtype="fp32").settings.optimizer_dtype == "fp32"


def test_settings_of_an_optimizer_that_is_not_chosen_may_be_written_out_as_they_are(tmp_path: Path) -> None:
    assert resolved(tmp_path, muon_lr=0.02, muon_ns_steps=5, lr_warmup_steps=0).settings.optimizer == "adamw"
    assert resolved(tmp_path, optimizer="muon", muon_lr=0.1).settings.muon_lr == 0.1


def test_a_constant_schedule_has_a_warm_up_and_no_end(tmp_path: Path) -> None:
    assert resolved(tmp_path, lr_schedule="constant", lr_warmup_steps=5).settings.lr_warmup_steps == 5
    assert "lr_total_steps: 9 belongs to a schedule that falls" in refusal(
        tmp_path, lr_schedule="constant", lr_total_steps=9
    )


@pytest.mark.config_field("worker_bind_host", "worker_bind_port", "worker_bind_address", "engine_connect_host")
def test_the_zmq_fields_get_one_notice_together(tmp_path: Path) -> None:
    quiet = len(resolved(tmp_path).notices)
    notices = resolved(
        tmp_path, worker_bind_port=1, worker_bind_host="h", worker_bind_address="a", engine_connect_host="b"
    ).notices
    assert len(notices) == quiet + 1
    assert all(name in notices[-1].message for name in ZMQ)


@pytest.mark.parametrize(
    "given",
    [{"num_ranks": 2}, {"data_parallel_replicate_size": 2}, {"num_ranks": 2, "data_parallel_replicate_size": 2}],
    ids=["ranks", "replicas", "both"],
)
def test_ranks_and_replicas_give_each_other(tmp_path: Path, given: dict[str, int]) -> None:
    settings = resolved(tmp_path, **given).settings
    assert (settings.num_ranks, settings.data_parallel_replicate_size, settings.torch_threads) == (2, 2, 4)


@pytest.mark.config_field("num_ranks", "data_parallel_replicate_size", "data_parallel_mode")
def test_ranks_that_contradict_the_parallel_sizes_are_refused(tmp_path: Path) -> None:
    assert "num_ranks: 4 is not the product" in refusal(tmp_path, num_ranks=4, data_parallel_replicate_size=2)
    assert "data_parallel_mode: none has one rank, not 2" in refusal(tmp_path, num_ranks=2, data_parallel_mode="none")


@pytest.mark.config_field("device", "attn_implementation", "enable_mixed_precision", "sample_packing_sequence_len")
def test_a_gpu_gets_other_defaults_than_a_cpu(tmp_path: Path) -> None:
    on_gpu = resolved(tmp_path, has_cuda=True, lacks=PACKAGES).settings
    on_cpu = resolved(tmp_path, has_cuda=True, device="cpu").settings
    assert (on_gpu.device, on_gpu.attn_implementation, on_gpu.enable_mixed_precision) == ("cuda", "native", True)
    assert (on_cpu.device, on_cpu.attn_implementation, on_cpu.enable_mixed_precision) == ("cpu", "sdpa", False)
    assert (on_gpu.sample_packing_sequence_len, on_cpu.sample_packing_sequence_len) == (32000, 2048)


@pytest.mark.config_field(
    "attn_implementation", "rope_native", "activation_native", "ce_mode", "enable_compile", "init_device"
)
def test_what_the_machine_lacks_is_replaced_with_a_notice_and_refused_when_it_was_asked_for(tmp_path: Path) -> None:
    gpu = resolved(tmp_path, has_cuda=True).settings
    assert (gpu.attn_implementation, gpu.rope_native, gpu.ce_mode, gpu.init_device) == (
        "flash_attention_3",
        False,
        "compiled",
        "meta",
    )
    bare = resolved(tmp_path, has_cuda=True, lacks=[*PACKAGES, "triton", "accelerate"])
    adapted = {"attn_implementation", "rope_native", "activation_native", "ce_mode", "init_device"}
    assert adapted <= {notice.field for notice in bare.notices}
    assert (bare.settings.attn_implementation, bare.settings.ce_mode, bare.settings.init_device) == (
        "native",
        "eager",
        "cpu",
    )
    words = "this machine has no compiler for it"
    assert words in refusal(tmp_path, has_cuda=True, lacks=["triton"], enable_compile=True)
    assert words in refusal(tmp_path, lacks=["compiler"], rope_native=False)
    assert resolved(tmp_path, lacks=["triton"], rope_native=False, ce_mode="compiled").settings.rope_native is False
    assert "needs a package" in refusal(
        tmp_path, has_cuda=True, lacks=["flash_attn.cute"], attn_implementation="flash_attention_4"
    )


@pytest.mark.config_field("config_path", "tokenizer_path")
def test_a_config_and_a_tokenizer_may_come_from_elsewhere(tmp_path: Path) -> None:
    moe = str(ROOT / "tests/models/tiny-qwen3-moe-shakespeare")
    settings = resolved(tmp_path, config_path=moe).settings
    assert (settings.config_path, settings.tokenizer_id) == (moe, moe)
    settings = resolved(tmp_path, tokenizer_path=moe).settings
    assert (settings.config_path, settings.tokenizer_path, settings.tokenizer_id) == (None, moe, moe)


@pytest.mark.config_field("model_path", "model_name", "tokenizer_id", "redis_data_dir")
def test_names_and_paths_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = resolved(
        tmp_path, model_path="tests/models/tiny-qwen3-shakespeare", output_dir=str(tmp_path / "out")
    ).settings
    assert settings.model_name == "tests/models/tiny-qwen3-shakespeare"
    assert settings.model_path == settings.tokenizer_id == MODEL
    assert settings.redis_data_dir == str(tmp_path / "out" / "redis")
    assert settings.batch_budget_tokens == settings.sample_packing_sequence_len


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    assert resolved(tmp_path, model_path="Qwen/Qwen3-8B").settings.model_path == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("model_path", "message"),
    [
        ("./nowhere", "model_path: no directory ./nowhere"),
        ("/nowhere/at/all", "model_path: no directory /nowhere/at/all"),
        (str(ROOT / "tests"), "has no config.json; it must be a Hugging Face model directory"),
        ("smollm2-135m-instruct", "get it with `gradstream models fetch smollm2-135m-instruct`"),
    ],
)
def test_a_model_that_is_not_there_is_refused(tmp_path: Path, model_path: str, message: str) -> None:
    assert message in refusal(tmp_path, model_path=model_path)


def test_a_packaged_model_is_found_in_the_cache(tmp_path: Path) -> None:
    directory = tmp_path / "models/HuggingFaceTB/SmolLM2-135M-Instruct"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    assert resolved(tmp_path, model_path="smollm2-135m-instruct").settings.model_path == str(directory)


def test_fields_of_the_embedded_server_are_refused_beside_a_redis_url(tmp_path: Path) -> None:
    assert refusal(tmp_path, redis_url="redis://h", durability="none").startswith(
        "durability: of the embedded server, which redis_url"
    )


@pytest.mark.parametrize("field", ["config_path", "tokenizer_path"])
def test_the_models_own_path_may_be_written_for_its_parts(tmp_path: Path, field: str) -> None:
    settings = resolved(tmp_path, **{field: MODEL}).settings
    assert getattr(settings, field) == settings.model_path


@pytest.mark.config_field("lora_rank", "max_lora_rank")
def test_the_rank_of_clients_that_name_none_is_one_that_they_may_ask_for(tmp_path: Path) -> None:
    assert resolved(tmp_path, lora_rank=8).settings.lora_rank == 8
    lowered = resolved(tmp_path, max_lora_rank=16)
    assert lowered.settings.lora_rank == 16
    assert "lora_rank: 16 here, which is max_lora_rank; the default 32 is above it" in {
        n.message for n in lowered.notices
    }
    message = refusal(tmp_path, lora_rank=17, max_lora_rank=16)
    assert message == "lora_rank: 17 is above max_lora_rank: 16, the highest rank"
