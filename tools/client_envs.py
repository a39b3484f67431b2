"""An environment for each stock client that the contract tests run: .cache/clients/NAME, from the pins beside those tests.

Run by `make client-envs`. An environment that was made from the same pins and Python is left as it is. Packages that this
interpreter has at the pinned version are linked instead of being fetched and unpacked again, torch above all; never the SDK itself.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests" / "contract" / "clients"
ENVIRONMENTS = ROOT / ".cache" / "clients"
ALONE = ".alone"
STAMP = "made-from"
OWN = "tinker"


def names() -> list[str]:
    """The clients, from the pin files: NAME.txt, and NAME.alone.txt for what is installed without its dependencies."""
    return sorted(path.stem for path in PINS.glob("*.txt") if not path.stem.endswith(ALONE))


def python_of(name: str) -> Path:
    """The interpreter of a client's environment."""
    return ENVIRONMENTS / name / "bin" / "python"


def fingerprint(name: str) -> str:
    """Changes with the pins of a client and with the Python that its environment is made from."""
    digest = hashlib.sha256(sys.version.encode())
    for path in _pin_files(name):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_ready(name: str) -> bool:
    """True when the environment holds what the pins say."""
    stamp = ENVIRONMENTS / name / STAMP
    return stamp.exists() and stamp.read_text(encoding="utf-8") == fingerprint(name)


def make(name: str, *, pip_args: Sequence[str]) -> None:
    """Build one environment from nothing. Raises CalledProcessError when pip fails."""
    folder = ENVIRONMENTS / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for distribution in _at_hand(name):
        link(distribution, folder)
    install = [str(python_of(name)), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *pip_args]
    for path in _pin_files(name):
        extra = ["--no-deps"] if path.stem.endswith(ALONE) else []
        subprocess.run([*install, *extra, "-r", str(path)], check=True)
    (folder / STAMP).write_text(fingerprint(name), encoding="utf-8")


def link(distribution: Distribution, folder: Path) -> None:
    """Put an installed distribution's modules into the environment in folder: links to the same files, copies on another disk."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for file in distribution.files or ():
        source = Path(str(distribution.locate_file(file)))
        # Scripts, which name their interpreter, and byte code are left out.
        if ".." in file.parts or file.suffix == ".pyc" or not source.is_file():
            continue
        target = packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)


def _at_hand(name: str) -> Iterator[Distribution]:
    """What this interpreter has of a client's pins. A local version such as 2.13.0+cpu is the pinned 2.13.0."""
    lines = "\n".join(path.read_text(encoding="utf-8") for path in _pin_files(name))
    pins = {_canonical(package): version for package, version in re.findall(r"^([\w.-]+)==(\S+)$", lines, re.MULTILINE)}
    for distribution in distributions():
        package = _canonical(distribution.name)
        if package != OWN and pins.get(package) == distribution.version.partition("+")[0]:
            yield distribution


def _canonical(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _pin_files(name: str) -> list[Path]:
    return [path for path in (PINS / f"{name}.txt", PINS / f"{name}{ALONE}.txt") if path.exists()]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every environment that was asked for is there."""
    parser = argparse.ArgumentParser(prog="client_envs", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names())}")
    parser.add_argument("--pip-args", default="", help="more words for pip, in one string")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    for name in options.names or names():
        if is_ready(name):
            sys.stdout.write(f"{name}: ready\n")
            continue
        sys.stdout.write(f"{name}: installing its pinned packages (the first time takes some minutes)\n")
        sys.stdout.flush()
        make(name, pip_args=shlex.split(options.pip_args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
