"""What an engine's fingerprint says: how a replay is set up like the engine that wrote a log, and in what it cannot be."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Literal, TypedDict

import msgspec
import torch

from gradstream.engine.attention.choose import can_attend
from gradstream.engine.config import DTypePolicy, EngineConfig, Memory, Merging, Numerics
from gradstream.engine.numerics import resolve_dtype
from gradstream.engine.optim.schedule import Schedule
from gradstream.shared.wire import OptimizerSpec
from gradstream.worker.facts import changed_facts, facts

_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


def differences(logged: str, here: str) -> list[str]:
    """In words, everything in which the engine of a log was another one than this."""
    was, now = facts(logged), facts(here)
    return [
        f"{name} is {now.get(name, 'unknown')} here and was {was.get(name, 'unknown')}"
        for name in changed_facts(logged, here)
    ]


def num_ranks(fingerprint: str) -> int:
    """By how many ranks a log was written; 1 when the fingerprint does not say."""
    text = facts(fingerprint).get("ranks", "1")
    return int(text) if text.isdecimal() else 1


def adopted(config: EngineConfig, logged: str) -> EngineConfig:
    """config with everything that can be chosen as the log's engine had it: threads, attention, dtype, lora_alpha, seed,
    numerics, compiled units, what is trained, by which optimizer and schedule, and when adapters are merged.

    The number of threads may exceed the cores of this machine: results depend on it, and not on the cores.
    """
    was = facts(logged)
    threads, attention, dtype = (was.get(name, "") for name in ("threads", "attention", "dtype"))
    alpha, seed = was.get("lora_alpha", ""), was.get("seed", "")
    policy = DTypePolicy(dtype) if dtype in set(DTypePolicy) else config.dtype
    return replace(
        config,
        torch_threads=int(threads) if threads.isdecimal() else config.torch_threads,
        attention=attention if _attends(attention, config, policy) else config.attention,
        dtype=policy,
        lora_alpha=float(alpha) if _NUMBER.fullmatch(alpha) else config.lora_alpha,
        seed=int(seed) if _NUMBER.fullmatch(seed) and seed.lstrip("-").isdecimal() else config.seed,
        numerics=_numerics(was, config.numerics),
        memory=_memory(was, config.memory),
        **_training(was),
        **_learning(was),
    )


def _attends(name: str, config: EngineConfig, policy: DTypePolicy) -> bool:
    """True if that back-end runs here; another machine's may not."""
    device = torch.device(config.device)
    return can_attend(name, device=device, dtype=resolve_dtype(policy, device))


def _numerics(was: Mapping[str, str], here: Numerics) -> Numerics:
    """here with every value that the facts name; other words are left out."""
    words: dict[str, object] = {"true": True, "false": False, "null": None}
    for part in fields(Numerics):
        if (text := was.get(part.name)) is not None:
            with suppress(msgspec.ValidationError):
                value = getattr(msgspec.convert({part.name: words.get(text, text)}, Numerics), part.name)
                here = replace(here, **{part.name: value})
    return here


def _memory(was: Mapping[str, str], here: Memory) -> Memory:
    """here with the units of the log where these were compiled, and else with no units: what is kept does not change results."""
    if not was:
        return here
    names = was.get("units", "")
    return replace(here, basic_modules=tuple(names.split(",")) if names else ())


class _Learning(TypedDict, total=False):
    optimizer: OptimizerSpec
    schedule: Schedule | None
    merging: Merging


def _learning(was: Mapping[str, str]) -> _Learning:
    """By what models learned that did not say; the defaults are not in a fingerprint. Nothing when the facts do not say or do not read."""
    if not was:
        return {}
    try:
        return {
            "optimizer": msgspec.json.decode(was.get("optimizer", "{}"), type=OptimizerSpec),
            "schedule": msgspec.json.decode(was.get("schedule", "null"), type=Schedule | None),
            "merging": msgspec.json.decode(was.get("merging", "{}"), type=Merging),
        }
    except msgspec.DecodeError:
        return {}


class _Training(TypedDict, total=False):
    is_lora: bool
    master_dtype: Literal["fp32", "bf16"]
    freeze_router: bool
    lora_target_modules: tuple[str, ...] | None


def _training(was: Mapping[str, str]) -> _Training:
    """Whether adapters or full weights were trained; nothing when the facts do not say."""
    if not was:
        return {}
    if was.get("weights") != "full":
        modules = was.get("modules")
        return {"is_lora": True, "lora_target_modules": None if modules is None else tuple(modules.split(","))}
    return {
        "is_lora": False,
        "master_dtype": "bf16" if was.get("master") == "bf16" else "fp32",
        "freeze_router": was.get("router") != "free",
    }
