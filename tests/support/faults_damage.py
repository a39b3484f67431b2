"""Damage to files: shortened, with flipped bits, or replaced by older ones."""

import shutil
from pathlib import Path

from tests.support.faults_server import Server


def cut_tail(path: Path, num_bytes: int) -> None:
    """Take the last num_bytes away; a shorter file ends up empty."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(max(0, size - num_bytes))


def flip_bit(path: Path, at: float) -> None:
    """Turn one bit over; at says where, as a share of the file's length."""
    size = path.stat().st_size
    assert size > 0, f"{path} is empty"
    with path.open("r+b") as file:
        position = min(size - 1, int(size * at))
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def append_files(server: Server) -> list[Path]:
    """The queue server's append-only files, the growing one last."""
    return sorted((server.output_dir / "redis" / "appendonlydir").glob("*.incr.aof"))


def segments(server: Server) -> list[Path]:
    """The segments of the log on disk, oldest first."""
    return sorted((server.output_dir / "joblog").rglob("*.seg"))


def cuts(server: Server) -> list[Path]:
    """The manifests of the snapshots, oldest first."""
    return sorted((server.output_dir / "snapshots").glob("*/cuts/*.json"))


def snapshot_files(server: Server, cut: Path) -> list[Path]:
    """The files of the models that the snapshot of this manifest names."""
    text = cut.read_text()
    found = [
        path for path in (server.output_dir / "snapshots").rglob("models/*/*") if path.is_dir() and path.name in text
    ]
    return sorted(
        file for directory in found for file in directory.rglob("*") if file.is_file() and file.stat().st_size
    )


def copy_queue(server: Server, target: Path) -> None:
    """Keep a copy of the queue server's data, as a replica or a backup would have it."""
    shutil.copytree(server.output_dir / "redis", target, ignore=shutil.ignore_patterns("*.sock"))


def put_back_queue(server: Server, source: Path) -> None:
    """Replace the queue server's data by a copy; the server must not run."""
    shutil.rmtree(server.output_dir / "redis")
    shutil.copytree(source, server.output_dir / "redis")
