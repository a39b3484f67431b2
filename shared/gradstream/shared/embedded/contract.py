"""What any Redis server must offer before jobs are entrusted to it."""

import time
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, NoPermissionError, RedisError
from redis.retry import Retry

_SOCKET_TIMEOUT_S = 5.0
_POLL_S = 0.1
_PROBE = "#!lua\nreturn ARGV[1]"


class ContractRefused(ValueError):
    """The server cannot be used as it is. The message says what to change."""


def check_contract(url: str, *, timeout_s: float = 30.0) -> list[str]:
    """Warnings about a server that can be used, one sentence each; raises ContractRefused for one that cannot.

    Only INFO and one script are sent, since managed services forbid CONFIG. A server that is still loading is waited for.
    """
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError as error:
        raise ContractRefused(f"redis_url is not valid: {error}") from error
    try:
        info = _info(client, timeout_s=timeout_s)
        _refuse(info)
        _probe_scripts(client)
        return warnings_of(info)
    finally:
        client.close()


def warnings_of(info: dict[str, Any]) -> list[str]:
    """What is allowed but risky, from INFO's fields (redis-py types them: int, str)."""
    warnings: list[str] = []
    if not info.get("aof_enabled"):
        warnings.append(
            "the Redis server has no append-only file: accepted jobs are lost when it restarts; "
            "set `appendonly yes` and `appendfsync always`"
        )
    if not info.get("maxmemory"):
        warnings.append(
            "the Redis server has no memory limit: set `maxmemory`, so that it refuses writes before the machine is full"
        )
    if info.get("connected_slaves"):
        warnings.append(
            "the Redis server has replicas: replication is asynchronous, and a failover can lose acknowledged jobs"
        )
    return warnings


def _refuse(info: dict[str, Any]) -> None:
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < (7, 0):
        raise ContractRefused(f"the Redis server's version is {version}; 7.0 or newer, or Valkey, is needed")
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        raise ContractRefused(
            f"the Redis server's maxmemory-policy is {policy!r}, which deletes jobs when memory runs short; set `maxmemory-policy noeviction`"
        )
    role = info.get("role")
    if role != "master":
        raise ContractRefused(
            f"the Redis server's role is {role!r}; redis_url must name the master, since replicas refuse writes"
        )
    if info.get("cluster_enabled"):
        raise ContractRefused(
            "the Redis server runs in cluster mode; use a server without it (one engine needs only one)"
        )


def _info(client: "redis.Redis", *, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            info: dict[str, Any] = dict(client.info())
            loading = bool(info.get("loading"))
        except BusyLoadingError:
            loading, info = True, {}
        except NoPermissionError as error:
            raise ContractRefused(f"the Redis user may not call INFO: {error}; allow it in the ACL") from error
        except RedisError as error:
            raise ContractRefused(
                f"the Redis server cannot be used: {error}; check redis_url, and that the server runs"
            ) from error
        if not loading:
            return info
        if time.monotonic() > deadline:
            raise ContractRefused(
                f"the Redis server was still loading its data after {timeout_s:.0f} s; wait, then start again"
            )
        time.sleep(_POLL_S)


def _probe_scripts(client: "redis.Redis") -> None:
    try:
        reply = client.eval(_PROBE, 0, "ok")
    except RedisError as error:
        raise ContractRefused(
            f"the Redis server does not run Lua scripts for this user: {error}; allow EVAL, EVALSHA and SCRIPT"
        ) from error
    if reply != b"ok":
        raise ContractRefused(f"the Redis server answered a test script with {reply!r} instead of 'ok'")
