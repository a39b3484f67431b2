"""The response that answers an accepted job with its promise."""

import msgspec
from fastapi import Response

from gradstream.api.ordered import Promise


class Answer(Response):
    """A promise as JSON."""

    media_type = "application/json"

    def __init__(self, promise: Promise) -> None:
        super().__init__(msgspec.json.encode(promise))
