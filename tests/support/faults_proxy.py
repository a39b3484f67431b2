"""A proxy between a server's processes and its queue server that delays, cuts, swallows, or calls back at a chosen script."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

import psutil

from gradstream.shared.joblog import lua

_CHUNK_BYTES = 1 << 16


class Moment(Enum):
    """Where in an exchange a hook is called: before the request goes on, or after its reply came and before the caller has it."""

    BEFORE = auto()
    AFTER = auto()


@dataclass(slots=True)
class Weather:
    """What happens to the traffic of the connections that `who` names (None: all) until it is changed.

    is_cut: connections are closed, new ones refused. requests_lost, replies_lost: bytes of this direction vanish while the
    connection stays open. delay_s: each chunk waits up to twice this long. loss: the share of chunks at which a connection breaks.
    """

    is_cut: bool = False
    requests_lost: bool = False
    replies_lost: bool = False
    delay_s: float = 0.0
    loss: float = 0.0


@dataclass(slots=True)
class _Hook:
    """Called once, at the nth request from now on that runs the script; then the connection is cut when cuts says so."""

    sha: bytes
    moment: Moment
    call: Callable[[], None]
    left: int
    cuts: bool


class Proxy:
    """Listens on a loopback port and forwards to a Unix socket. Its own thread runs it; methods may be called from any."""

    def __init__(self, socket_path: str, *, who: Callable[[int], str] = lambda _: "", seed: int = 0) -> None:
        self.port = 0
        self._socket_path = socket_path
        self._who = who
        self._random = random.Random(seed)
        self._weather: dict[str, Weather] = {}
        self._calm = Weather()
        self._hook: _Hook | None = None
        self._open: dict[asyncio.StreamWriter, str] = {}
        self._num_hurt = 0
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = starting.result(10)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @contextmanager
    def weather(self, weather: Weather, *, who: str | None = None) -> Iterator[None]:
        """Have this weather for the block, for the connections of one role or for all; its connections are closed at the end."""
        self._weather[who or ""] = weather
        if weather.is_cut:
            self.cut(who)
        try:
            yield
        finally:
            del self._weather[who or ""]
            # What was swallowed is lost for good; the callers find out by a broken connection, as with a real partition.
            self.cut(who)

    def cut(self, who: str | None = None) -> None:
        """Close the open connections of one role, or all."""

        def cut() -> None:
            for writer, name in list(self._open.items()):
                if who is None or name == who:
                    writer.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    def at_script(
        self, name: str, moment: Moment, call: Callable[[], None], *, nth: int = 1, cuts: bool = False
    ) -> None:
        """Call at the nth run of the Lua script from now on, in the proxy's thread. cuts: the reply is lost with the connection."""
        self._hook = _Hook(sha=lua.load(name).sha.encode(), moment=moment, call=call, left=nth, cuts=cuts)

    @property
    def has_called(self) -> bool:
        """True when the last hook was called."""
        return self._hook is None

    @property
    def num_hurt(self) -> int:
        """How often a weather has done something: a connection refused or broken, a chunk swallowed or held up."""
        return self._num_hurt

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _weather_of(self, name: str) -> Weather:
        return self._weather.get(name) or self._weather.get("") or self._calm

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not here: it looks through all processes, which takes seconds on a busy machine, and every connection would stand still.
        name = await asyncio.to_thread(self._who, writer.get_extra_info("peername")[1])
        if self._weather_of(name).is_cut:
            self._num_hurt += 1
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self._socket_path)
        except OSError:
            writer.transport.abort()
            return
        self._open[writer] = name
        exchange = _Exchange()
        try:
            done, pending = await asyncio.wait(
                [
                    asyncio.ensure_future(self._requests(reader, up_writer, name, exchange)),
                    asyncio.ensure_future(self._replies(up_reader, writer, name, exchange)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in pending:
                task.cancel()
            await asyncio.gather(*done, *pending, return_exceptions=True)
        finally:
            del self._open[writer]
            writer.transport.abort()
            up_writer.transport.abort()

    async def _requests(
        self, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter, name: str, exchange: "_Exchange"
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._struggle(name)
            hook = self._hook
            if hook is not None and hook.sha in data:
                hook.left -= 1
                if hook.left == 0:
                    if hook.moment is Moment.BEFORE:
                        self._hook = None
                        hook.call()
                        if hook.cuts:
                            return
                    else:
                        exchange.hook = hook
            if self._weather_of(name).requests_lost:
                self._num_hurt += 1
            else:
                up_writer.write(data)
                await up_writer.drain()

    async def _replies(
        self, up_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, exchange: "_Exchange"
    ) -> None:
        while data := await up_reader.read(_CHUNK_BYTES):
            await self._struggle(name)
            if (hook := exchange.hook) is not None:
                exchange.hook = self._hook = None
                hook.call()
                if hook.cuts:
                    return
            if self._weather_of(name).replies_lost:
                self._num_hurt += 1
            else:
                writer.write(data)
                await writer.drain()

    async def _struggle(self, name: str) -> None:
        weather = self._weather_of(name)
        if weather.delay_s:
            self._num_hurt += 1
            await asyncio.sleep(self._random.uniform(0, 2 * weather.delay_s))
        if weather.loss and self._random.random() < weather.loss:
            self._num_hurt += 1
            raise ConnectionError("lost")


@dataclass(slots=True)
class _Exchange:
    """What the two directions of one connection tell each other."""

    hook: _Hook | None = None


def owner_of_port(port: int) -> psutil.Process | None:
    """The process of this machine whose connection has this local port."""
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                return psutil.Process(connection.pid)
    return None
