"""What this machine has, as far as the configuration depends on it; and the process environment."""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts that defaults depend on. has_cuda: an NVIDIA device and a torch that can use it."""

    num_cores: int
    has_cuda: bool
    cache_dir: Path

    @classmethod
    def here(cls) -> "Machine":
        """This machine, found without importing torch."""
        return cls(num_cores=_num_cores(), has_cuda=_has_cuda(), cache_dir=_cache_dir())


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedPlace:
    """What torchrun says of this process: its rank, and how many there are."""

    rank: int
    size: int


def launched_place() -> LaunchedPlace | None:
    """This process's place in the gang that torchrun started, None when it was not started by torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # noqa: TID251 - this package reads the environment for all
        return None
    return LaunchedPlace(rank=int(os.environ["RANK"]), size=int(os.environ["WORLD_SIZE"]))  # noqa: TID251 - as above


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with changes, for a process to be started."""
    return {**os.environ, **changes}  # noqa: TID251 - this package reads the environment for all


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_cuda() -> bool:
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path("/dev/nvidia0").exists() and not torch_version.endswith("+cpu")


def _cache_dir() -> Path:
    environment = os.environ  # noqa: TID251 - this package reads the environment for all
    if own := environment.get("GRADSTREAM_CACHE"):
        return Path(own)
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gradstream"
