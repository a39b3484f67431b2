"""Requests that this server makes to machines that a client named: bounded in time and size, and not to everywhere.

A name is resolved once, every address that it has is checked, and the request goes to a checked address, so that a name cannot mean
another machine a moment later. Nothing follows a redirect, and no proxy stands between.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import httpx
import msgspec

from gradstream.shared.errors import InvalidRequest

# Where clouds hand credentials to whoever asks from within: AWS, Alibaba; all others are link-local.
_CREDENTIALS = frozenset({"fd00:ec2::254", "100.100.100.200"})
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*\.?")
_MAX_HOST_CHARS = 253
_MAX_ANSWER_BYTES = 256 * 1024
# Machines that are asked at the same time.
_MAX_CALLS = 8


class Unreachable(Exception):
    """The machine could not be reached, or its answer is of no use; the text says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A machine's HTTP server: the name it was given by, and a checked address of it."""

    host: str
    port: int
    address: str

    @property
    def authority(self) -> str:
        """HOST:PORT as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_host(host: str) -> str:
    """The host in the form in which it is kept; raises InvalidRequest unless it is a host's name or an IP address.

    Names are ASCII, as DNS has them; addresses have no zone, which means something on one machine only.
    """
    text = host.strip("[]").lower()
    if host.isascii() and "%" not in host:
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            if len(text) <= _MAX_HOST_CHARS and _HOST.fullmatch(text) is not None:
                return text.rstrip(".")
    raise InvalidRequest(
        f"host: {host[:100]!r} is neither a host's name nor an IP address; leave out http:// and the port"
    )


def _check_address(host: str, address: str) -> None:
    """Raise Unreachable for addresses that no inference server has, those at which clouds hand out credentials among them."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    is_odd = ip.is_link_local or ip.is_multicast or ip.is_unspecified or (ip.is_reserved and not ip.is_loopback)
    if is_odd or str(ip) in _CREDENTIALS:
        raise Unreachable(f"{host!r} is at {address}, an address that this server does not call")


class Outbound:
    """Calls to other machines, of one event loop: few at a time, however many are asked for. `close` it at the end."""

    def __init__(self) -> None:
        # Plain HTTP only: no certificates are read.
        self._http = httpx.AsyncClient(trust_env=False, follow_redirects=False, verify=False)  # noqa: S501
        self._turns = asyncio.Semaphore(_MAX_CALLS)
        # Names that nobody resolves hold up no other work in threads.
        self._resolvers = ThreadPoolExecutor(max_workers=_MAX_CALLS, thread_name_prefix="resolve")

    async def close(self) -> None:
        """Drop the connections; a look-up that still runs is not waited for."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        await self._http.aclose()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until fewer than _MAX_CALLS machines are asked."""
        async with self._turns:
            yield

    async def resolve(self, host: str, port: int, *, timeout_s: float) -> Target:
        """The target; raises Unreachable for a name without an address, or with one that is not to be called."""
        look = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(timeout_s):
                found = await asyncio.get_running_loop().run_in_executor(self._resolvers, look)
        except TimeoutError as error:
            raise Unreachable(f"the name {host!r} was not resolved within {timeout_s:g} s") from error
        except OSError as error:
            raise Unreachable(f"the name {host!r} has no address: {error.strerror or error}") from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            _check_address(host, address)
        return Target(host=host, port=port, address=addresses[0])

    async def get(self, target: Target, path: str, *, timeout_s: float) -> bytes:
        """The body of a 2xx answer to GET path, which takes at most timeout_s; raises Unreachable otherwise."""
        literal = f"[{target.address}]" if ":" in target.address else target.address
        url = f"http://{literal}:{target.port}{path}"
        headers = {"Host": target.authority, "Accept": "application/json", "Accept-Encoding": "identity"}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream("GET", url, headers=headers, timeout=timeout_s) as answer,
            ):
                if not answer.is_success:
                    raise Unreachable(f"GET {path} was answered with status {answer.status_code}")
                return await _bounded(answer, path)
        except TimeoutError as error:
            raise Unreachable(f"GET {path} was not answered within {timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise Unreachable(f"GET {path} failed: {type(error).__name__}") from error

    async def get_object(self, target: Target, path: str, *, timeout_s: float) -> dict[str, object]:
        """The JSON object of an answer; raises Unreachable for any other answer."""
        body = await self.get(target, path, timeout_s=timeout_s)
        try:
            return msgspec.json.decode(body, type=dict[str, object])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unreachable(f"GET {path} was not answered with a JSON object") from error


async def _bounded(answer: httpx.Response, path: str) -> bytes:
    """The bytes as they were sent: whatever they would unpack to, no more is kept."""
    body = bytearray()
    async for part in answer.aiter_raw():
        body += part
        if len(body) > _MAX_ANSWER_BYTES:
            raise Unreachable(f"GET {path} was answered with more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(body)
