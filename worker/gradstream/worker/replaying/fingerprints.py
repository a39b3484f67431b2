"""What an engine's fingerprint says: how a replay is set up like the engine that wrote a log, and in what it cannot be."""

import re
from dataclasses import replace

from gradstream.engine.attention.registry import ATTENTION
from gradstream.engine.config import DTypePolicy, EngineConfig

_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


def facts(fingerprint: str) -> dict[str, str]:
    """The parts of a fingerprint by name."""
    return dict(part.split("=", 1) for part in fingerprint.split() if "=" in part)


def differences(logged: str, here: str) -> list[str]:
    """In words, everything in which the engine of a log was another one than this."""
    was, now = facts(logged), facts(here)
    return [
        f"{name} is {now.get(name, 'unknown')} here and was {was.get(name, 'unknown')}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]


def num_ranks(fingerprint: str) -> int:
    """By how many ranks a log was written; 1 when the fingerprint does not say."""
    text = facts(fingerprint).get("ranks", "1")
    return int(text) if text.isdecimal() else 1


def adopted(config: EngineConfig, logged: str) -> EngineConfig:
    """config with everything that can be chosen as the log's engine had it: threads, attention, dtype, lora_alpha, seed.

    The number of threads may exceed the cores of this machine: results depend on it, and not on the cores.
    """
    was = facts(logged)
    threads, attention, dtype = (was.get(name, "") for name in ("threads", "attention", "dtype"))
    alpha, seed = was.get("lora_alpha", ""), was.get("seed", "")
    return replace(
        config,
        torch_threads=int(threads) if threads.isdecimal() else config.torch_threads,
        attention=attention if attention in ATTENTION else config.attention,
        dtype=DTypePolicy(dtype) if dtype in set(DTypePolicy) else config.dtype,
        lora_alpha=float(alpha) if _NUMBER.fullmatch(alpha) else config.lora_alpha,
        seed=int(seed) if _NUMBER.fullmatch(seed) and seed.lstrip("-").isdecimal() else config.seed,
    )
