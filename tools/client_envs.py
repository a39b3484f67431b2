"""An environment for each stock client that the contract tests run: .cache/clients/NAME, from the pins beside those tests.

Run by `make client-envs`. An environment that was made from the same pins and Python is left as it is.
"""

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tests" / "contract" / "clients"
ENVIRONMENTS = ROOT / ".cache" / "clients"
ALONE = ".alone"
STAMP = "made-from"


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
    install = [str(python_of(name)), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *pip_args]
    for path in _pin_files(name):
        extra = ["--no-deps"] if path.stem.endswith(ALONE) else []
        subprocess.run([*install, *extra, "-r", str(path)], check=True)
    (folder / STAMP).write_text(fingerprint(name), encoding="utf-8")


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
