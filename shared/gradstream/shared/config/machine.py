"""What this machine has, as far as the configuration depends on it; and the process environment."""

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# The C++ compiler and the packages that some settings need.
COMPILER = "compiler"
FLASH_3, FLASH_4 = "flash_attn_interface", "flash_attn.cute"
OPTIONAL = (COMPILER, "triton", "accelerate", FLASH_3, FLASH_4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts that defaults depend on. has_cuda: an NVIDIA device and a torch that can use it. lacks: of OPTIONAL, what is not here."""

    num_cores: int
    has_cuda: bool
    cache_dir: Path
    lacks: frozenset[str] = frozenset()

    @classmethod
    def here(cls) -> "Machine":
        """This machine, found without importing torch."""
        return cls(num_cores=_num_cores(), has_cuda=_has_cuda(), cache_dir=_cache_dir(), lacks=_lacks())


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedPlace:
    """What torchrun says of this process: its rank, how many there are, and how many of them are on this machine."""

    rank: int
    size: int
    local_size: int


def launched_place() -> LaunchedPlace | None:
    """This process's place in the gang that torchrun started, None when it was not started by torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # noqa: TID251 - this package reads the environment for all
        return None
    environment = os.environ  # noqa: TID251 - as above
    size = int(environment["WORLD_SIZE"])
    local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
    return LaunchedPlace(rank=int(environment["RANK"]), size=size, local_size=local_size)


def redis_url_of_environment() -> str | None:
    """What GRADSTREAM_REDIS_URL says: a place for a URL with a password, which arguments and files would show."""
    return os.environ.get("GRADSTREAM_REDIS_URL") or None  # noqa: TID251 - this package reads the environment for all


def fixed_cublas_workspace() -> str:
    """The workspace of cuBLAS, set for this process unless it is: without one products may differ from run to run.

    It is read when cuBLAS is first used.
    """
    return os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # noqa: TID251 - this package reads the environment for all


def bound_onednn_kernels(count: int) -> None:
    """How many kernels torch and oneDNN each keep in this process, unless the environment says; both look when they make the first."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(count))  # noqa: TID251 - this package reads the environment for all


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


def _lacks() -> frozenset[str]:
    return frozenset(name for name in OPTIONAL if not (_has_compiler() if name == COMPILER else _has_package(name)))


def _has_compiler() -> bool:
    named = os.environ.get("CXX")  # noqa: TID251 - this package reads the environment for all
    return any(shutil.which(name) for name in (named, "g++", "clang++", "c++") if name)


def _has_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _cache_dir() -> Path:
    environment = os.environ  # noqa: TID251 - this package reads the environment for all
    if own := environment.get("GRADSTREAM_CACHE"):
        return Path(own)
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gradstream"
