"""How the job log connects to Redis, and what its errors mean."""

from contextlib import AbstractContextManager
from types import TracebackType

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from gradstream.shared.errors import QueueFull, Unavailable

# A blocking read must end well before its socket times out.
BLOCK_MS = 2000
_SOCKET_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5.0
_HEALTH_CHECK_S = 15
_POOL_WAIT_S = 10.0
_OUT_OF_MEMORY_RETRY_S = 5.0
_REFUSES_WRITES = ("MISCONF", "READONLY", "MASTERDOWN", "LOADING", "NOREPLICAS", "CLUSTERDOWN", "You can't")
# Commands are sent again after a lost connection; everything the job log sends may be applied twice with one effect.
_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 1.0


def async_client(
    url: str, *, max_connections: int, num_retries: int, socket_timeout_s: float | None = _SOCKET_TIMEOUT_S
) -> "redis.asyncio.Redis":
    """An unconnected asyncio client; callers above max_connections wait for a free one.

    socket_timeout_s: for one send or one answer; None where the caller bounds them.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=_POOL_WAIT_S,
        protocol=2,
        socket_timeout=socket_timeout_s,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        health_check_interval=_HEALTH_CHECK_S,
        retry=AsyncRetry(ExponentialWithJitterBackoff(base=_FIRST_DELAY_S, cap=_LONGEST_DELAY_S), num_retries),
    )
    return redis.asyncio.Redis.from_pool(pool)


def sync_client(url: str, *, num_retries: int) -> "redis.Redis":
    """An unconnected blocking client, safe for several threads."""
    return redis.Redis.from_url(
        url,
        protocol=2,
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        health_check_interval=_HEALTH_CHECK_S,
        retry=Retry(ExponentialWithJitterBackoff(base=_FIRST_DELAY_S, cap=_LONGEST_DELAY_S), num_retries),
    )


class _RedisErrors(AbstractContextManager[None]):
    """See redis_errors. Without state, and no generator, which every submission would pay for."""

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        match error:
            case RedisConnectionError() | RedisTimeoutError() | OSError():
                raise Unavailable(f"the job log cannot be reached: {error}") from error
            case OutOfMemoryError():
                raise QueueFull("the job log is at its memory limit", retry_after_s=_OUT_OF_MEMORY_RETRY_S) from error
            case ResponseError() if str(error).startswith(_REFUSES_WRITES):
                raise Unavailable(f"the job log refuses writes: {error}") from error


_REDIS_ERRORS = _RedisErrors()


def redis_errors() -> AbstractContextManager[None]:
    """Turn Redis being away or full into Unavailable or QueueFull. Errors that only a bug can cause pass through."""
    return _REDIS_ERRORS


__all__ = ["BLOCK_MS", "RedisError", "async_client", "redis_errors", "sync_client"]
