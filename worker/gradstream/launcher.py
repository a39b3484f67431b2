# ruff: noqa: INP001 - the namespace package itself has no __init__.py
"""`gradstream serve` under the name that users of xorl type: `python -m gradstream.launcher --mode auto --config FILE`."""

import sys

from gradstream.worker.cli import app

if __name__ == "__main__":
    app(["serve", *sys.argv[1:]], prog_name="gradstream")
