"""What all bodies of the xorl dialect have."""

from typing import ClassVar

from pydantic import model_validator

from gradstream.api.body import Body
from gradstream.shared.ids import DEFAULT_MODEL


class NamedBody(Body):
    """A small body about one model. session_id is another name for model_id; a missing one is the model `default`.

    seq_id: the client's own count of its requests, by which a repeated request is recognised. IDLE: further fields that clients send
    and that mean nothing here.
    """

    IDLE: ClassVar[frozenset[str]] = frozenset()

    model_id: str = DEFAULT_MODEL
    seq_id: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: object) -> object:
        """The body with model_id in place of session_id, without idle fields."""
        if not isinstance(data, dict):
            return data
        fields = {name: value for name, value in data.items() if name not in cls.IDLE and name not in _ROUTING}
        if "session_id" in fields:
            session = fields.pop("session_id")
            if session is not None and fields.setdefault("model_id", session) != session:
                raise ValueError("model_id and session_id name different models; send one of them")
        if fields.get("model_id", "") is None:
            del fields["model_id"]
        return fields


# Clients may add a name that a router in front of several servers reads.
_ROUTING = frozenset({"model"})
