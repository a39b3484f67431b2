"""constraints.txt as it follows from the running environment: every package that gradstream and its extras need, pinned.

Run by `make lock` after a deliberate upgrade inside .venv. Packages that the environment holds for other reasons stay out.
Local version tags (`+cpu`) are dropped, so that the file fits a CPU build and a GPU build alike.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = "gradstream"
EXTRAS = frozenset({"dev", "demo"})
PYTHONS = ("3.11", "3.12", "3.13")
HEADER = """\
# Every package that `pip install -e '.[dev,demo]'` brings, at the version the tests ran with.
# Written by `make lock`; used by `make setup` and the Dockerfile.
"""


def applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    """True when the requirement holds for one of the supported Pythons with one of the extras, or without any."""
    if requirement.marker is None:
        return True
    return any(
        requirement.marker.evaluate({"extra": extra, "python_version": python, "python_full_version": f"{python}.0"})
        for extra in sorted(extras | {""})
        for python in PYTHONS
    )


def closure(root: str, extras: frozenset[str]) -> dict[str, str]:
    """Installed version by canonical name of everything that root with extras needs, root left out."""
    seen: set[tuple[str, frozenset[str]]] = set()
    pins: dict[str, str] = {}
    todo = [(root, extras)]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name != root:
            pins[name] = Version(distribution.version).public
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if applies(requirement, wanted):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return pins


def text() -> str:
    """The content of constraints.txt for this environment."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(closure(ROOT, EXTRAS).items()))


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "constraints.txt"
    target.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"wrote {target.name}\n")
