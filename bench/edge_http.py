"""The smallest HTTP client that the load needs: one request at a time on a connection that stays open."""

import asyncio
import json
from typing import NamedTuple, Self

PROTOBUF = "application/x-protobuf"
JSON = "application/json"


class Answer(NamedTuple):
    """status, and the body as it came."""

    status: int
    body: bytes
    retry_after_s: float


class Connection:
    """To one server. Not for several tasks at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host

    @classmethod
    async def open(cls, port: int) -> Self:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        return cls(reader, writer, f"127.0.0.1:{port}")

    async def post(self, path: str, body: bytes, media_type: str = JSON) -> Answer:
        """The whole answer; raises ConnectionError when the server hangs up."""
        head = (
            f"POST /api/v1/{path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: {media_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode())
        self._writer.write(body)
        await self._writer.drain()
        return await self._answer()

    async def ask(self, path: str, fields: dict[str, object]) -> dict[str, object]:
        """The JSON answer to a JSON body; raises RuntimeError unless it is a 200."""
        answer = await self.post(path, json.dumps(fields).encode())
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {answer.body[:300]!r}")
        decoded: dict[str, object] = json.loads(answer.body)
        return decoded

    def close(self) -> None:
        self._writer.close()

    async def _answer(self) -> Answer:
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the server closed the connection") from error
        return Answer(int(lines[0].split(" ")[1]), body, float(headers.get("retry-after", "0")))
