"""Where the ranks of a gang meet, who starts them, and what to type on the machines that the launcher does not reach."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gradstream.shared.config import ConfigError, Problem

LOOPBACK = "127.0.0.1"
# torchrun's own default.
DEFAULT_PORT = 29500


class Mode(StrEnum):
    """Who starts the gang: auto = the launcher, this machine's part of it; connect = somebody, with torchrun."""

    AUTO = "auto"
    CONNECT = "connect"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """host and port None: as suits the mode. num_nodes: machines that the gang runs on, this one included."""

    mode: Mode = Mode.AUTO
    host: str | None = None
    port: int | None = None
    num_nodes: int = 1

    @property
    def address(self) -> str:
        return self.host or LOOPBACK

    @property
    def is_on_one_machine(self) -> bool:
        """True when nobody else has to know where the ranks meet."""
        return self.mode is Mode.AUTO and self.num_nodes == 1

    def ranks_per_node(self, num_ranks: int) -> int:
        """Ranks of each machine."""
        return num_ranks // self.num_nodes


def rendezvous(*, mode: str, num_nodes: int, host: str | None, port: int | None) -> Rendezvous:
    """The options --mode, --nnodes, --master-addr and --master-port. Raises ConfigError."""
    problems = []
    if mode not in tuple(Mode):
        problems.append(
            Problem(
                "--mode",
                f"{mode!r} is not a mode; use auto, which starts the gang here, or connect, when it is started by hand",
            )
        )
    if num_nodes < 1:
        problems.append(Problem("--nnodes", f"{num_nodes} is no number of machines; use 1 or more"))
    if mode == Mode.AUTO and num_nodes > 1 and host is None:
        message = f"missing: {num_nodes} nodes meet at an address of this machine that the others can reach"
        problems.append(Problem("--master-addr", message))
    if problems:
        raise ConfigError(problems)
    port = port if port is not None or num_nodes == 1 else DEFAULT_PORT
    return Rendezvous(mode=Mode(mode), host=host, port=port, num_nodes=num_nodes)


def check_split(meet: Rendezvous, num_ranks: int) -> None:
    """Raise ConfigError unless every machine gets the same number of ranks."""
    if num_ranks % meet.num_nodes:
        message = f"{meet.num_nodes} nodes cannot share num_ranks: {num_ranks} evenly; set num_ranks to a multiple"
        raise ConfigError([Problem("--nnodes", message)])


def commands(meet: Rendezvous, *, num_ranks: int, config: Path, overrides: Sequence[str]) -> list[str]:
    """What to type on the machines that the launcher does not start, one line a machine.

    overrides: `--server.key=value` words that the gang needs too.
    """
    first = 0 if meet.mode is Mode.CONNECT else 1
    return [
        shlex.join(
            [
                "torchrun",
                f"--nnodes={meet.num_nodes}",
                f"--node_rank={rank}",
                f"--nproc_per_node={meet.ranks_per_node(num_ranks)}",
                f"--master_addr={meet.address}",
                f"--master_port={meet.port or DEFAULT_PORT}",
                "-m",
                "gradstream.worker",
                "--config",
                str(config),
                *overrides,
            ]
        )
        for rank in range(first, meet.num_nodes)
    ]
