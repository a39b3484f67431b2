"""A config file resolved once, for processes that no launcher starts (containers): the settings file that each of them takes.

    python -m gradstream.shared.config --config FILE --write FILE [--server.key value ...]

Exit status: 0 written, 78 the configuration cannot be used (every mistake on stderr).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gradstream.shared.config import EXIT_CONFIG, ConfigError, load_settings, resolve, write_handover
from gradstream.shared.config.machine import Machine, redis_url_of_environment
from gradstream.shared.config.remote import REDIS_URL_VARIABLE, with_redis_url


def main(arguments: Sequence[str]) -> int:
    """Write the resolved settings, and say on stderr what was adapted to this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m gradstream.shared.config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="the YAML file")
    parser.add_argument("--write", type=Path, required=True, help="where the settings go (mode 0600)")
    options, overrides = parser.parse_known_args(arguments)
    try:
        settings = load_settings(options.config, overrides)
        if settings.redis_url is None:
            settings = with_redis_url(settings, redis_url_of_environment(), place=REDIS_URL_VARIABLE)
        resolved = resolve(settings, Machine.here())
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    for notice in resolved.notices:
        sys.stderr.write(f"{notice.message}\n")
    write_handover(resolved.settings, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
