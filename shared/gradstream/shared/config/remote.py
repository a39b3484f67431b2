"""Settings whose parts are on several machines: where their Redis is, and whether a config suits a machine that is not this one."""

from dataclasses import replace

import msgspec

from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.problems import ConfigError, Problem
from gradstream.shared.config.resolve import Resolved, resolve
from gradstream.shared.config.settings import Settings

REDIS_URL_VARIABLE = "GRADSTREAM_REDIS_URL"


def with_redis_url(settings: Settings, url: str | None, *, place: str) -> Settings:
    """The settings with this URL if there is one. place: where it was given. Raises ConfigError when it is no Redis URL."""
    if url is None:
        return settings
    try:
        msgspec.convert(url, FIELDS["redis_url"].annotation)
    except msgspec.ValidationError as error:
        # The value may hold a password.
        raise ConfigError([Problem(place, f"redis_url: the value is not {FIELDS['redis_url'].expected()}")]) from error
    return msgspec.structs.replace(settings, redis_url=url, explicit=settings.explicit | {"redis_url"})


def resolve_for_gang_elsewhere(settings: Settings, machine: Machine) -> Resolved:
    """The settings in use on machine, when the gang may be on another one: what needs a GPU is not refused for want of one here.

    Raises ConfigError with what cannot be had anywhere.
    """
    try:
        return resolve(settings, machine)
    except ConfigError:
        if machine.has_cuda or settings.device == "cpu":
            raise
        with_gpu = msgspec.structs.replace(settings, device="cuda")
        return resolve(with_gpu, replace(machine, has_cuda=True, lacks=frozenset()))
