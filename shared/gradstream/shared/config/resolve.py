"""Settings as written to settings as used on this machine: defaults filled, impossible values refused, adaptations named."""

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gradstream.shared.config.access import access_problems, resolved_keys_file
from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.learning import learning_problems, state_dtype
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.memory import memory_problems
from gradstream.shared.config.problems import ConfigError, Problem, as_written
from gradstream.shared.config.settings import Settings
from gradstream.shared.config.sizes import format_size
from gradstream.shared.config.support import (
    CPU_DEFAULTS,
    EMBEDDED,
    ZMQ,
    Only,
    device_of,
    supported_values,
)

# Names for model_path, and the directory below the cache that `gradstream models fetch NAME` fills.
PACKAGED_MODELS = {"smollm2-135m-instruct": "models/HuggingFaceTB/SmolLM2-135M-Instruct"}

_TRAINING_URI = re.compile(r"(tinker|xorl)://[A-Za-z0-9][\w.:-]*/weights/[A-Za-z0-9][\w.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing to say at start about a field: a default that was adapted, or a setting without effect here."""

    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Settings in which every value is the one in use, and what to say about them."""

    settings: Settings
    notices: tuple[Notice, ...]


def resolve(settings: Settings, machine: Machine) -> Resolved:
    """The settings in use on machine. Raises ConfigError with everything that cannot be had."""
    problems: list[Problem] = []
    notices: list[Notice] = []
    device = device_of(settings, machine)
    if settings.device == "cuda" and not machine.has_cuda:
        problems.append(Problem("", "device: 'cuda' needs an NVIDIA GPU and a torch built for it; use cpu or auto"))
    changes = _possible(settings, supported_values(device, machine.lacks), problems, notices)
    changes |= _cpu_defaults(settings, device, notices, already=changes.keys())
    changes |= _ranks(settings, problems)
    changes |= _default_rank(settings, problems, notices)
    changes |= _model(settings, machine, problems)
    changes |= _start(settings, problems)
    changes |= _derived(settings, device, machine, changes)
    changes |= _optimizer_state(settings, notices)
    problems += learning_problems(settings)
    problems += memory_problems(settings, changes)
    _check_pairs(settings, problems)
    _check_master(settings, changes, problems)
    _check_merging(settings, problems)
    _check_precision(settings, changes, problems)
    problems += access_problems(settings)
    if problems:
        raise ConfigError(problems)
    if zmq := [name for name in ZMQ if name in settings.explicit]:
        notices.append(Notice(zmq[0], f"{', '.join(zmq)}: no effect, since Redis takes the place of ZMQ here"))
    return Resolved(settings=msgspec.structs.replace(settings, **changes), notices=tuple(notices))


def _possible(
    settings: Settings, possible: dict[str, Only], problems: list[Problem], notices: list[Notice]
) -> dict[str, object]:
    changes: dict[str, object] = {}
    for name, only in possible.items():
        value = getattr(settings, name)
        if value in only.values:
            continue
        if name in settings.explicit:
            problems.append(Problem("", _refusal(name, value, only)))
        else:
            changes[name] = only.values[0]
            notices.append(
                Notice(name, f"{name}: {as_written(only.values[0])} here; the default {as_written(value)} {only.why}")
            )
    return changes


def _refusal(name: str, value: object, only: Only) -> str:
    show = _size if FIELDS[name].is_size else as_written
    return f"{name}: {show(value)} {only.why}; use {' or '.join(map(show, only.values))}"


def _size(value: object) -> str:
    assert isinstance(value, int)
    return format_size(value)


def _cpu_defaults(
    settings: Settings, device: str, notices: list[Notice], *, already: AbstractSet[str]
) -> dict[str, object]:
    kept = settings.explicit | already
    changes = {name: value for name, value in CPU_DEFAULTS.items() if device == "cpu" and name not in kept}
    for name, value in changes.items():
        notices.append(
            Notice(
                name, f"{name}: {as_written(value)} here; the default {as_written(getattr(settings, name))} is for GPUs"
            )
        )
    return changes


def _optimizer_state(settings: Settings, notices: list[Notice]) -> dict[str, object]:
    dtype = state_dtype(settings)
    if dtype != settings.optimizer_dtype:
        default = settings.optimizer_dtype
        notices.append(
            Notice("optimizer_dtype", f"optimizer_dtype: {dtype} here; the default {default} is for full weights")
        )
    return {"optimizer_dtype": dtype}


def _ranks(settings: Settings, problems: list[Problem]) -> dict[str, object]:
    """One of num_ranks and data_parallel_replicate_size gives the other, as long as no other axis exists."""
    ranks, replicas = settings.num_ranks, settings.data_parallel_replicate_size
    if {"num_ranks", "data_parallel_replicate_size"} <= settings.explicit and ranks != replicas:
        problems.append(
            Problem("", f"num_ranks: {ranks} is not the product of the parallel sizes, which is {replicas}")
        )
    size = ranks if "num_ranks" in settings.explicit else replicas
    if size > 1 and settings.data_parallel_mode == "none":
        problems.append(Problem("", f"data_parallel_mode: none has one rank, not {size}; use ddp"))
    return {"num_ranks": size, "data_parallel_replicate_size": size}


def _default_rank(settings: Settings, problems: list[Problem], notices: list[Notice]) -> dict[str, object]:
    """The rank of clients that name none is one that clients may ask for."""
    rank, highest = settings.lora_rank, settings.max_lora_rank
    if rank <= highest:
        return {}
    if "lora_rank" in settings.explicit:
        problems.append(Problem("", f"lora_rank: {rank} is above max_lora_rank: {highest}, the highest rank"))
    notices.append(
        Notice("lora_rank", f"lora_rank: {highest} here, which is max_lora_rank; the default {rank} is above it")
    )
    return {"lora_rank": highest}


def _model(settings: Settings, machine: Machine, problems: list[Problem]) -> dict[str, object]:
    model_path, problem = _existing(settings.model_path, machine)
    problems.extend(problem)
    config_path = _directory("config_path", "config.json", settings.config_path, model_path, problems)
    tokenizer_path = _directory("tokenizer_path", "tokenizer.json", settings.tokenizer_path, config_path, problems)
    return {
        "model_path": model_path,
        "model_name": settings.model_name or settings.model_path,
        "config_path": settings.config_path and config_path,
        "tokenizer_path": settings.tokenizer_path and tokenizer_path,
        "tokenizer_id": settings.tokenizer_id or tokenizer_path,
    }


def _start(settings: Settings, problems: list[Problem]) -> dict[str, object]:
    """The absolute path of the checkpoint to start from. What a URI names lies below output_dir, where the engine finds it."""
    text = settings.load_checkpoint_path
    if not text or _TRAINING_URI.fullmatch(text):
        return {}
    path = Path(text).expanduser()
    if not (path / "manifest.json").is_file():
        problems.append(
            Problem(
                "",
                f"load_checkpoint_path: {text} has no manifest.json; it must be a checkpoint's directory, or a URI of the form "
                "tinker://MODEL/weights/NAME or xorl://MODEL/weights/NAME",
            )
        )
    return {"load_checkpoint_path": str(path.resolve())}


def _directory(name: str, file: str, text: str | None, default: str, problems: list[Problem]) -> str:
    """The absolute path of a directory that a field names and that must hold file; default where it names none."""
    if text is None:
        return default
    path = Path(text).expanduser()
    if not (path / file).is_file():
        problems.append(
            Problem("", f"{name}: {text} has no {file}; it must be a Hugging Face directory on this machine")
        )
    return str(path.resolve())


def _existing(text: str, machine: Machine) -> tuple[str, list[Problem]]:
    """The absolute path of a directory, a hub id as it is, or a problem."""
    if (inside := PACKAGED_MODELS.get(text)) is not None:
        directory = machine.cache_dir / inside
        if (directory / "config.json").is_file():
            return str(directory), []
        return text, [
            Problem("", f"model_path: {text} is not on this machine yet; get it with `gradstream models fetch {text}`")
        ]
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            return text, [
                Problem("", f"model_path: {text} has no config.json; it must be a Hugging Face model directory")
            ]
        return str(path.resolve()), []
    if _HUB_ID.fullmatch(text):
        return text, []
    return text, [
        Problem(
            "", f"model_path: no directory {text} (seen from {Path.cwd()}), and no Hugging Face id ORGANISATION/NAME"
        )
    ]


def _derived(settings: Settings, device: str, machine: Machine, changes: dict[str, object]) -> dict[str, object]:
    output_dir = Path(settings.output_dir).expanduser().resolve()
    num_ranks = changes["num_ranks"]
    assert isinstance(num_ranks, int)
    row_tokens = changes.get("sample_packing_sequence_len", settings.sample_packing_sequence_len)
    return {
        "device": device,
        "output_dir": str(output_dir),
        "redis_data_dir": settings.redis_data_dir or str(output_dir / "redis"),
        "api_keys_file": resolved_keys_file(settings),
        "torch_threads": settings.torch_threads or max(1, machine.num_cores // num_ranks),
        "batch_budget_tokens": settings.batch_budget_tokens or row_tokens,
    }


def _check_precision(settings: Settings, changes: dict[str, object], problems: list[Problem]) -> None:
    """Logits can be of less than float32 only where the rest is."""
    if not changes.get("enable_mixed_precision", settings.enable_mixed_precision):
        problems += [
            Problem("", f"{name}: false asks for less than float32 where everything is computed in float32; use true")
            for name in ("router_fp32", "lm_head_fp32")
            if not getattr(settings, name)
        ]


def _check_master(settings: Settings, changes: dict[str, object], problems: list[Problem]) -> None:
    """Weights without a float32 copy are those of full-weight training in bfloat16."""
    if settings.master_dtype == "fp32":
        return
    if settings.enable_lora:
        problems.append(Problem("", "master_dtype: bf16 is of full-weight training, and enable_lora is true; use fp32"))
    elif not changes.get("enable_mixed_precision", settings.enable_mixed_precision):
        problems.append(Problem("", "master_dtype: bf16 needs enable_mixed_precision: true; use fp32"))


def _check_merging(settings: Settings, problems: list[Problem]) -> None:
    """Merges are of adapters, and what belongs to them means nothing without."""
    interval = settings.merge_lora_interval
    if interval and not settings.enable_lora:
        problems.append(
            Problem(
                "",
                f"merge_lora_interval: {interval} merges LoRA adapters, and enable_lora is false, which trains the full weights themselves; "
                "use 0",
            )
        )
    if settings.reset_optimizer_on_merge and not interval:
        problems.append(
            Problem(
                "", "reset_optimizer_on_merge: true belongs to merge_lora_interval, which is 0; use false, or set it"
            )
        )
    if interval and settings.max_merged_lora_rank < 2 * settings.lora_rank:
        problems.append(
            Problem(
                "",
                f"max_merged_lora_rank: {settings.max_merged_lora_rank} has no room for one merge of lora_rank: {settings.lora_rank}; use "
                f"{2 * settings.lora_rank} or more",
            )
        )


def _check_pairs(settings: Settings, problems: list[Problem]) -> None:
    """Fields that must agree with one another."""
    rules = (
        ("max_queued_bytes_per_tenant", "max_queued_bytes", "the budget of all tenants"),
        ("restart_backoff_s", "max_restart_backoff_s", "the longest pause"),
    )
    for low, high, meaning in rules:
        if getattr(settings, low) > getattr(settings, high):
            low_value, high_value = getattr(settings, low), getattr(settings, high)
            problems.append(Problem("", f"{low}: {low_value} is above {high}: {high_value}, {meaning}"))
    # A body is held packed and unpacked, and one tenant gets half of the room.
    if (needed := 4 * max(settings.max_body_bytes, settings.max_json_body_bytes)) > settings.max_inflight_body_bytes:
        problems.append(
            Problem(
                "",
                f"max_inflight_body_bytes: {settings.max_inflight_body_bytes} is below {needed}, four of the largest bodies "
                "(max_body_bytes, max_json_body_bytes), so that one of them could never come in",
            )
        )
    if settings.redis_url is not None and (useless := [name for name in EMBEDDED if name in settings.explicit]):
        names = ", ".join(useless)
        problems.append(
            Problem("", f"{names}: of the embedded server, which redis_url replaces; remove one of the two")
        )
