"""What a server takes of the machine: memory and open files by process, files by directory."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.faults_server import Role, Server

_MB = 1024**2
# A process may grow by this much over a run: caches that fill once, arenas of the allocator.
_RSS_SLACK_BYTES = 150 * _MB
_FD_SLACK = 40
# Directories below output_dir whose files must not grow with the number of faults, and how many each may hold.
_MAX_FILES = {"redis": 12, "run": 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """At one moment."""

    rss_bytes: Mapping[Role, int]
    num_fds: Mapping[Role, int]
    num_files: Mapping[str, int]


def footprint(server: Server) -> Footprint:
    """What the server takes now."""
    rss, fds = {}, {}
    for role, members in server.processes().items():
        try:
            rss[role] = max(member.memory_info().rss for member in members)
            fds[role] = max(member.num_fds() for member in members)
        except psutil.Error:
            continue
    return Footprint(rss_bytes=rss, num_fds=fds, num_files=_num_files(server.output_dir))


def _num_files(directory: Path) -> Counter[str]:
    """How many files there are below each entry of a directory in which processes are at work: what goes meanwhile is not counted."""
    return Counter(
        Path(folder, name).relative_to(directory).parts[0] for folder, _, names in os.walk(directory) for name in names
    )


def growth(before: Footprint, after: Footprint) -> list[str]:
    """One line for everything that grew beyond its bound."""
    lines = []
    for role, now in after.rss_bytes.items():
        if role in before.rss_bytes and now > before.rss_bytes[role] + _RSS_SLACK_BYTES:
            lines.append(f"memory of {role}: {before.rss_bytes[role] // _MB} MB before, {now // _MB} MB after")
    for role, now in after.num_fds.items():
        if role in before.num_fds and now > before.num_fds[role] + _FD_SLACK:
            lines.append(f"open files of {role}: {before.num_fds[role]} before, {now} after")
    for name, bound in _MAX_FILES.items():
        if after.num_files.get(name, 0) > bound:
            lines.append(f"{name}/ holds {after.num_files[name]} files, more than {bound}")
    return lines
