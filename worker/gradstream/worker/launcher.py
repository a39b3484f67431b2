"""Runs a whole server: the queue, the gang, housekeeping, exports and the API, from start to a clean stop."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
from rich.console import Console

from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.config import Settings, write_handover
from gradstream.shared.config.agreement import disagreements, terms_of_engine
from gradstream.shared.embedded.binary import NoServerBinary
from gradstream.shared.embedded.config import EmbeddedConfig
from gradstream.shared.embedded.contract import ContractRefused, check_contract
from gradstream.shared.embedded.paths import DataDirInUse
from gradstream.shared.embedded.server import EmbeddedServer, ServerDidNotStart
from gradstream.shared.errors import Unavailable
from gradstream.worker.crew import Crew, api_spec, exporter_spec, gang_spec, housekeeping_spec, restart_policy
from gradstream.worker.engine_watch import EngineWatch
from gradstream.worker.gang_watch import HandGang, OwnGang
from gradstream.worker.ports import PortTaken, with_free_port
from gradstream.worker.rendezvous import Mode, Rendezvous
from gradstream.worker.run_dir import OutputDirInUse, RunDir
from gradstream.worker.shift import CannotStart, Posts, Shift, Stop, Voice
from gradstream.worker.supervise import Supervised

_log = structlog.get_logger(__name__)

_HEALTHY_API_AFTER_S = 60.0
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to run. settings: resolved. commands: what starts the part of the gang that the launcher does not."""

    settings: Settings
    meet: Rendezvous
    commands: Sequence[str] = ()


def serve(launch: Launch, *, console: Console, stop: Stop, clock: Clock | None = None) -> None:
    """Run the server until stop is requested.

    Raises CannotStart before anything runs, or when a child says that the configuration cannot be served; everything that was
    started has ended when this returns or raises.
    """
    clock = clock or SystemClock()
    say = Voice(console=console)
    try:
        settings, warning = with_free_port(launch.settings)
    except PortTaken as error:
        raise CannotStart(str(error)) from error
    if warning is not None:
        say(warning)
    with ExitStack() as stack:
        try:
            run_dir = stack.enter_context(RunDir(Path(settings.output_dir)))
            url, server = _queue(settings, stack)
        except (OutputDirInUse, DataDirInUse, NoServerBinary, ServerDidNotStart, ContractRefused) as error:
            raise CannotStart(str(error)) from error
        except OSError as error:
            raise CannotStart(f"output_dir: {settings.output_dir} cannot be used: {error.strerror}") from error
        handed = msgspec.structs.replace(settings, redis_url=url, lease_owner=run_dir.owner())
        write_handover(handed, run_dir.settings_file)
        watch = stack.enter_context(EngineWatch(url, engine=settings.engine_name))
        _agree(watch, handed, mode=launch.meet.mode, stop=stop, clock=clock)
        crew = _crew(handed, run_dir, meet=launch.meet, clock=clock)
        stack.callback(crew.stop, timeout_s=settings.stop_timeout_s, clock=clock)
        Shift(
            Posts(
                crew=crew,
                gang=_gang_watch(crew, launch, settings=handed, say=say, clock=clock),
                watch=watch,
                server=server,
                terms=terms_of_engine(settings),
            ),
            settings=handed,
            say=say,
            clock=clock,
        ).run(stop)
        if crew.gang is None:
            say("stopping; the gang is left alone")
        else:
            say(
                f"stopping: the gang finishes its batch within {settings.stop_timeout_s:g} s, or is killed and repeats it at the next start"
            )
    say("stopped")


def _queue(settings: Settings, stack: ExitStack) -> tuple[str, EmbeddedServer | None]:
    """The URL of the queue's server, which is started here unless there is one already."""
    if settings.redis_url is not None:
        for warning in check_contract(settings.redis_url):
            _log.warning("redis_contract", problem=warning)
        return settings.redis_url, None
    assert settings.redis_data_dir is not None
    config = EmbeddedConfig(
        data_dir=Path(settings.redis_data_dir),
        durability=settings.durability,
        max_memory_bytes=settings.redis_memory_limit,
        binary=Path(settings.redis_binary) if settings.redis_binary else None,
        stop_timeout_s=settings.stop_timeout_s,
    )
    server = stack.enter_context(EmbeddedServer(config))
    return server.url, server


def _agree(watch: EngineWatch, settings: Settings, *, mode: Mode, stop: Stop, clock: Clock) -> None:
    """Tell the gangs what they must agree to. Raises CannotStart when one that was started by hand agreed to something else."""
    mine = terms_of_engine(settings)
    try:
        theirs = watch.terms()
        found = disagreements(mine, theirs) if theirs is not None and mode is Mode.CONNECT else []
        if found and (leader := _lasting_leader(watch, settings, stop=stop, clock=clock)):
            raise CannotStart(
                f"{leader} leads a gang that was started with another config: {'; '.join(found)}. "
                "Stop that gang first, or use the config that it was started with"
            )
        watch.publish(mine)
    except Unavailable as error:
        raise CannotStart(error.message) from error


def _lasting_leader(watch: EngineWatch, settings: Settings, *, stop: Stop, clock: Clock) -> str:
    """Whose gang leads the engine; "" when nobody does, or when the lease of one that died runs out."""
    watch.clear_lease(settings.lease_owner)
    deadline_s = clock.monotonic_s() + settings.lease_ttl_s
    while not stop.is_requested:
        sight = watch.look()
        leader = sight.lease_owner if sight is not None else ""
        if not leader or clock.monotonic_s() >= deadline_s:
            return leader
        stop.wait(_LOOK_S)
    return ""


def _crew(settings: Settings, run_dir: RunDir, *, meet: Rendezvous, clock: Clock) -> Crew:
    path = run_dir.settings_file
    policy = restart_policy(settings, healthy_after_s=_HEALTHY_API_AFTER_S)
    gang = None
    if meet.mode is Mode.AUTO:
        # A gang is healthy when it finishes batches, not when it merely lives.
        gang_policy = restart_policy(settings, healthy_after_s=None)
        spec = gang_spec(path, run_dir, settings=settings, meet=meet)
        gang = Supervised(spec, policy=gang_policy, clock=clock)
    return Crew(
        gang=gang,
        housekeeping=Supervised(housekeeping_spec(path, run_dir), policy=policy, clock=clock),
        exporter=Supervised(exporter_spec(path, run_dir), policy=policy, clock=clock),
        api=Supervised(api_spec(path, run_dir), policy=policy, clock=clock),
    )


def _gang_watch(crew: Crew, launch: Launch, *, settings: Settings, say: Voice, clock: Clock) -> OwnGang | HandGang:
    if crew.gang is None:
        return HandGang(launch.commands, say=say)
    if launch.commands:
        say("start the gang's other part, on each further machine one of these:")
        for command in launch.commands:
            say(f"  {command}")
    return OwnGang(crew.gang, settings=settings, say=say, clock=clock)
