"""How the ranks of a gang come to settings that they agree on: handed down by the launcher, or found when started by hand."""

import math
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import msgspec
import structlog

from gradstream.engine.parallel.comm import Comm
from gradstream.shared.clock import Clock
from gradstream.shared.config import ConfigError, Problem, Settings, load_settings, resolve
from gradstream.shared.config.agreement import Terms, disagreements, terms_of_engine, terms_of_gang
from gradstream.shared.config.machine import LaunchedPlace, Machine, redis_url_of_environment
from gradstream.shared.config.remote import REDIS_URL_VARIABLE, with_redis_url
from gradstream.shared.embedded.paths import socket_path
from gradstream.shared.errors import Unavailable
from gradstream.worker.engine_watch import EngineWatch

_ASK_EVERY_S = 0.5
_SAY_EVERY_S = 10.0

_log = structlog.get_logger(__name__)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 tells the others before the model is loaded. problem: why the gang cannot go on; is_config: it never will."""

    terms: Terms = {}
    problem: str = ""
    is_config: bool = False


def settings_by_hand(
    config: Path, overrides: Sequence[str], *, redis_url: str | None, place: LaunchedPlace | None
) -> Settings:
    """The settings of a rank that somebody starts with torchrun. redis_url: of the command line. Raises ConfigError.

    The lease is this run's own: another gang waits until it runs out, and is not taken for a successor.
    """
    settings = load_settings(config, overrides)
    if redis_url is None and settings.redis_url is None:
        settings = with_redis_url(settings, redis_url_of_environment(), place=REDIS_URL_VARIABLE)
    settings = with_redis_url(settings, redis_url, place="--redis-url")
    machine = Machine.here()
    resolved = resolve(settings, machine).settings
    size = 1 if place is None else place.size
    if size != resolved.num_ranks:
        message = (
            f"num_ranks: {resolved.num_ranks} is what the config's parallel sizes give, and torchrun started {size} (nodes times "
            "nproc_per_node); make them the same"
        )
        raise ConfigError([Problem("", message)])
    if "torch_threads" not in settings.explicit:
        num_here = 1 if place is None else place.local_size
        resolved = msgspec.structs.replace(resolved, torch_threads=max(1, machine.num_cores // num_here))
    owner = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    return msgspec.structs.replace(resolved, lease_owner=owner)


def join_server(settings: Settings, *, clock: Clock) -> Settings:
    """The settings with the URL of the server's Redis, for rank 0 of a gang that was started by hand.

    Waits until `gradstream serve --mode connect` runs, for worker_connection_timeout. Raises ConfigError when the two configs differ,
    Unavailable when no server shows up.
    """
    assert settings.redis_data_dir is not None
    url = settings.redis_url or f"unix://{quote(str(socket_path(Path(settings.redis_data_dir))))}"
    with EngineWatch(url, engine=settings.engine_name) as watch:
        theirs = _await_terms(watch, settings, clock=clock)
    if found := disagreements(terms_of_engine(settings), theirs):
        message = (
            f"this gang's config is not that of the server it would serve: {'; '.join(found)}. "
            "Start both with the same config file and the same --server.FIELD arguments"
        )
        raise ConfigError([Problem("", message)])
    return msgspec.structs.replace(settings, redis_url=url)


def agree(comm: Comm, settings: Settings, *, join: Callable[[], Settings] | None = None) -> Settings:
    """The settings, when every rank of the gang has the same. Collective. join: what rank 0 does to reach the server.

    Raises ConfigError on every rank when two of them differ, or when join does; Unavailable likewise.
    """
    mine = terms_of_gang(settings)
    verdict = Verdict()
    if comm.is_leader:
        settings, verdict = _joined(settings, join, mine)
    verdict = _tell(comm, verdict)
    found = [] if verdict.problem else disagreements(mine, verdict.terms)
    others = comm.gather_bytes(_about_rank(comm.rank, found).encode())
    if others is not None and (problem := "".join(text.decode() for text in others)):
        verdict = Verdict(problem=problem, is_config=True)
    verdict = _tell(comm, verdict)
    if not verdict.problem:
        return settings
    if verdict.is_config:
        raise ConfigError([Problem("", verdict.problem)])
    raise Unavailable(verdict.problem)


def _joined(settings: Settings, join: Callable[[], Settings] | None, terms: Terms) -> tuple[Settings, Verdict]:
    try:
        return (settings if join is None else join()), Verdict(terms=terms)
    except ConfigError as error:
        return settings, Verdict(problem=str(error), is_config=True)
    except Unavailable as error:
        return settings, Verdict(problem=error.message)


def _tell(comm: Comm, verdict: Verdict) -> Verdict:
    data = msgspec.json.encode(verdict) if comm.is_leader else None
    return msgspec.json.decode(comm.broadcast_bytes(data), type=Verdict)


def _about_rank(rank: int, found: Sequence[str]) -> str:
    if not found:
        return ""
    return (
        f"rank {rank} on {socket.gethostname()} has another config than rank 0: {'; '.join(found)}. "
        "Start all ranks with the same config file and the same --server.FIELD arguments\n"
    )


def _await_terms(watch: EngineWatch, settings: Settings, *, clock: Clock) -> Terms:
    start_s, said_s, reason = clock.monotonic_s(), -math.inf, ""
    while (now_s := clock.monotonic_s()) - start_s < settings.worker_connection_timeout:
        try:
            if (terms := watch.terms()) is not None:
                return terms
            reason = f"its Redis has no engine {settings.engine_name!r} that `gradstream serve` has started"
        except Unavailable as error:
            reason = error.message
        if now_s - said_s >= _SAY_EVERY_S:
            said_s = now_s
            _log.warning("server_wait", reason=reason)
        threading.Event().wait(_ASK_EVERY_S)
    raise Unavailable(
        f"no server within worker_connection_timeout: {settings.worker_connection_timeout:g} s ({reason}). {_advice(settings)}"
    )


def _advice(settings: Settings) -> str:
    if "redis_url" in settings.explicit:
        return "Start `gradstream serve --mode connect` with the same config, or correct redis_url"
    return (
        f"redis_url is not set, so it was looked for at {settings.redis_data_dir}, where an embedded queue is reached from its own "
        "machine only. Start `gradstream serve --mode connect` here; when it runs on another machine, set redis_url to a Redis "
        f"that both reach (in the config, as --redis-url or as {REDIS_URL_VARIABLE}), or start rank 0 there"
    )
