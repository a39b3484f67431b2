"""An answer's head and the first part of its body in one piece.

uvicorn writes them one after the other, and uvloop sends each at once: two calls of the kernel, two segments, and a client that wakes up
twice.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# How uvicorn writes the head of an answer, and there that of one whose body is on its way.
_HEAD = b"HTTP/1.1 "
_HAS_BODY = b"\r\ncontent-length: "


class OneWriteProtocol(HttpToolsProtocol):
    """uvicorn's protocol on a transport that keeps a head back until the body comes, or the end of the answer.

    uvicorn offers no other place between an answer and its transport.
    """

    # uvicorn's own narrows the type in the same way.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # What is written goes this way; pausing and reading stay with the real one.
        self._gathering = self.transport = _Gathering(transport)  # type: ignore[assignment]

    def on_response_complete(self) -> None:
        # An answer to HEAD has a length and no body.
        self._gathering.flush()
        super().on_response_complete()


class _Gathering:
    """What uvicorn uses of a transport."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def write(self, data: bytes) -> None:
        head = self._head
        if head is not None:
            self._head = None
            self._transport.writelines((head, data))
        elif data.startswith(_HEAD) and _HAS_BODY in data:
            self._head = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Send a head that no body follows."""
        head, self._head = self._head, None
        if head is not None:
            self._transport.write(head)
