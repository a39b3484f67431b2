"""How every bench of the engine begins: its options, a scratch directory, a model."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from bench.text import make_model


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with what every bench of the engine takes; transformers is quiet afterwards, and torch has its threads."""
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face directory; without it a random Qwen3 of 6.8 M parameters"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both sides in turn, after one to warm up")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    return options


@contextmanager
def scratch_and_model(model: Path | None) -> Iterator[tuple[Path, Path]]:
    """A directory for the length of the block, and a model's: the given one, or a random one that is made in the first."""
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        yield Path(folder), model or make_model(Path(folder) / "model")
