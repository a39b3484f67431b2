"""Who may reach a server: the rules that tie its address to its API keys."""

import ipaddress
from pathlib import Path

from gradstream.shared.config.problems import Problem
from gradstream.shared.config.settings import Settings


def is_loopback(host: str) -> bool:
    """True for names and addresses that only this machine reaches."""
    name = host.removeprefix("[").removesuffix("]")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def access_problems(settings: Settings) -> list[Problem]:
    """Why these settings would let the wrong people in, or nobody; empty when they are sound."""
    if settings.api_keys_file is None:
        if is_loopback(settings.api_host) or settings.api_without_keys:
            return []
        return [
            Problem(
                "",
                f"api_host: {settings.api_host} can be reached from other machines, and there are no API keys; make some with "
                "`gradstream keys add TENANT --file api-keys.json` and set api_keys_file: api-keys.json, or use 127.0.0.1",
            )
        ]
    problems = []
    if settings.api_without_keys:
        problems.append(Problem("", "api_without_keys: true contradicts api_keys_file; remove one of the two"))
    if not Path(settings.api_keys_file).expanduser().is_file():
        problems.append(
            Problem(
                "",
                f"api_keys_file: {settings.api_keys_file} is not a file; make it with "
                f"`gradstream keys add TENANT --file {settings.api_keys_file}`",
            )
        )
    return problems


def resolved_keys_file(settings: Settings) -> str | None:
    """The absolute path of the key file, None when there is none."""
    named = settings.api_keys_file
    return None if named is None else str(Path(named).expanduser().resolve())
