"""Removes what no snapshot needs, in an order that a crash at any instant leaves valid."""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from gradstream.engine.files import DRAFT_SUFFIX, sync_directory
from gradstream.engine.snapshot.cut import CutId, parse_name


def remove_leftovers(
    *, files: Iterable[Path], cuts: Path, models: Path, needed: Collection[Path], newest: CutId
) -> None:
    """Remove these files of cuts, for good, and then the model directories that are not needed and the drafts.

    What belongs to a cut after newest stays. A directory half removed is named by no cut, and goes the next time. Raises OSError.
    """
    for path in files:
        path.unlink(missing_ok=True)
    if cuts.is_dir():
        sync_directory(cuts)
    for draft in cuts.glob(f".*{DRAFT_SUFFIX}"):
        if _is_old(draft, newest):
            draft.unlink(missing_ok=True)
    for model in _directories(models):
        for directory in _directories(model):
            if directory not in needed and _is_old(directory, newest):
                shutil.rmtree(directory)
        if not any(model.iterdir()):
            model.rmdir()


def _directories(path: Path) -> list[Path]:
    return [child for child in path.iterdir() if child.is_dir()] if path.is_dir() else []


def _is_old(path: Path, newest: CutId) -> bool:
    """True for what a cut up to newest wrote, or was about to write: `{cut}` or `.{cut}....tmp`."""
    cut_id = parse_name(path.name.removeprefix(".").partition(".")[0])
    return cut_id is not None and cut_id <= newest
