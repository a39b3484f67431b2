"""One rank of the gang: rank 0 leads, the others follow.

    torchrun ... -m gradstream.worker --config FILE [--redis-url URL] [--server.FIELD VALUE ...]

joins a server that `gradstream serve --mode connect` runs with the same config. The launcher itself starts ranks with --settings FILE.

Exit status: 0 stopped as asked, 78 the configuration cannot be served (one sentence on stderr), 75 another gang leads,
70 an operation hung, 1 anything else.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import structlog

from gradstream.engine.engine import Engine
from gradstream.engine.files import Revoked
from gradstream.engine.parallel.comm import Comm
from gradstream.shared.clock import SystemClock
from gradstream.shared.config import EXIT_CONFIG, ConfigError, Problem, read_handover
from gradstream.shared.config.machine import launched_place
from gradstream.shared.errors import Unavailable, Unsupported
from gradstream.shared.joblog.limits import limits_of
from gradstream.shared.joblog.port import Fenced
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.telemetry.log import setup_logging
from gradstream.worker.control import Control
from gradstream.worker.fence import StopRequest, exit_fenced
from gradstream.worker.follower import follow
from gradstream.worker.gang import lead
from gradstream.worker.joining import agree, join_server, settings_by_hand
from gradstream.worker.model_dir import model_directory
from gradstream.worker.parent import end_with_parent
from gradstream.worker.parts import engine_config, lead_options, redis_url

_log = structlog.get_logger(__name__)


def main() -> None:
    """Serve until told to stop."""
    arguments, overrides = _parser().parse_known_args()
    end_with_parent()
    try:
        _serve(arguments, overrides)
    except (ConfigError, Unsupported) as error:
        _exit_config(str(error))
    except (Fenced, Revoked) as error:
        exit_fenced(str(error))
    except Unavailable as error:
        _exit_now(1, error.message)
    except Exception as error:  # noqa: BLE001 - the last guard of the process, which ends here
        _log.exception("rank_failed")
        _exit_now(1, f"{type(error).__name__}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradstream.worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE", help="the server's config, YAML")
    source.add_argument("--settings", type=Path, metavar="FILE", help="resolved settings, as the launcher writes them")
    parser.add_argument(
        "--redis-url", metavar="URL", help="the server's Redis; else redis_url of the config, or GRADSTREAM_REDIS_URL"
    )
    parser.add_argument(
        "--meet", type=Path, help="file where the ranks of one machine meet; torchrun's address otherwise"
    )
    return parser


def _serve(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    place, join = launched_place(), None
    if arguments.settings is not None:
        if overrides or arguments.redis_url is not None:
            raise ConfigError([Problem("--settings", "has every setting already; overrides go with --config")])
        settings = read_handover(arguments.settings)
    else:
        settings = settings_by_hand(arguments.config, overrides, redis_url=arguments.redis_url, place=place)
        join = partial(join_server, settings, clock=SystemClock())
    comm = Comm.from_env(device=settings.device, meet=arguments.meet)
    setup_logging(process=f"rank{comm.rank}", level=settings.log_level)
    settings = agree(comm, settings, join=join)
    model_path = model_directory(settings.model_path)
    engine = Engine.open(engine_config(settings, model_path=model_path), comm)
    control = Control.open()
    if comm.is_leader:
        stop = StopRequest()
        signal.signal(signal.SIGTERM, stop.ask)
        signal.signal(signal.SIGINT, stop.ask)
        with RedisFeed(redis_url(settings), engine=settings.engine_name, limits=limits_of(settings)) as feed:
            lead(engine, control, feed, options=lead_options(settings), clock=SystemClock(), stop=stop)
    else:
        # The launcher signals every rank; rank 0 finishes its batch first, and then says stop.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        follow(control, engine)
    comm.close()


def _exit_config(message: str) -> NoReturn:
    _exit_now(EXIT_CONFIG, message)


def _exit_now(status: int, message: str) -> NoReturn:
    """End without clean-up: leaving a process group whose other ranks are stuck in a collective would hang."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
