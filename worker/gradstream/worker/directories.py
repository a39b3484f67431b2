"""Where an engine keeps what outlives its gangs, below output_dir."""

from pathlib import Path


def joblog_dir(output_dir: Path, engine: str) -> Path:
    """Where the engine's job log is on disk."""
    return output_dir / "joblog" / engine


def snapshots_dir(output_dir: Path, engine: str) -> Path:
    """Where the engine's snapshots are."""
    return output_dir / "snapshots" / engine
