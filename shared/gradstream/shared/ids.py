"""Identifier types, how they are made and what they may look like."""

import re
from dataclasses import dataclass
from typing import NewType

SessionId = NewType("SessionId", str)
ModelId = NewType("ModelId", str)
SamplerId = NewType("SamplerId", str)
FutureId = NewType("FutureId", str)
TenantId = NewType("TenantId", str)
# Whatever owns a sequence of jobs: a model (ordered) or a sampler (unordered).
OwnerId = ModelId | SamplerId

LOCAL_TENANT = TenantId("local")

# The model that clients of the xorl dialect may use without creating it; on a server that trains full weights, the only one.
DEFAULT_MODEL = "default"
# The checkpoint of the untrained model, which the server makes when clients of that dialect create one.
INITIAL_CHECKPOINT = "000000"

# The seq of a model's unload, which stands outside its order: it goes to the end of the log, behind everything accepted, and being
# fixed makes every repetition, by whomever, the same future. seq_id is an int32 on the protobuf wire; clients' seqs stay below it.
UNLOAD_SEQ = 2**31 - 1

# Processes that train one model together each number their own requests, in a lane of their own: a block of this many of the model's
# seqs, more than seq_ids there are. Lane 0 is that of clients that name none.
LANE_SEQS = 10**10
MAX_LANE = 999
# The lane of jobs that `gradstream dead retry` submits anew; no client can name it.
RETRY_LANE = MAX_LANE + 1

# Ids become parts of Redis keys and of paths, so they are checked where they enter.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
_SEQ = re.compile(r"[0-9]{1,19}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def is_valid_id(text: str) -> bool:
    """True when text may be used as a session, model or sampler id."""
    return _ID.fullmatch(text) is not None and ".." not in text


def is_valid_future_id(text: str) -> bool:
    """True when text may be a job's future: the longest owner's id with a seq behind it is longer than an id may be."""
    owner, _, seq = text.rpartition(":")
    return is_valid_id(owner) and _SEQ.fullmatch(seq) is not None


def is_valid_name(text: str) -> bool:
    """True when text may be the last part of a checkpoint URI (one path part, no slash, no colon)."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def model_id(session: SessionId, model_seq_id: int) -> ModelId:
    """The id of a session's nth model; the tinker SDK computes the same formula on its side."""
    return ModelId(f"{session}:train:{model_seq_id}")


def sampler_id(session: SessionId, sampling_session_seq_id: int) -> SamplerId:
    """The id of a session's nth sampler."""
    return SamplerId(f"{session}:sample:{sampling_session_seq_id}")


def session_of_sampler(sampler: SamplerId) -> SessionId:
    """The session that a sampler's id names."""
    return SessionId(sampler.rsplit(":sample:", 1)[0])


def seq_in_lane(lane: int, seq_id: int) -> int:
    """The seq of a lane's seq_id; lane 0's seqs are its seq_ids."""
    return lane * LANE_SEQS + seq_id


def lane_of(seq: int) -> int:
    """The lane that a model's seq lies in."""
    return seq // LANE_SEQS


def seq_text(seq: int) -> str:
    """A model's seq for a person to read: the seq_id, and the lane unless it is 0."""
    lane, seq_id = divmod(seq, LANE_SEQS)
    return f"{seq_id} of lane {lane}" if lane else str(seq_id)


def future_id(owner: OwnerId, seq: int) -> FutureId:
    """The id of a job's future: a function of (owner, seq), so that a retry names the same future."""
    return FutureId(f"{owner}:{seq}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureParts:
    """owner: the model or sampler whose job it is. seq: the job's place in the owner's sequence."""

    owner: str
    seq: int


def future_parts(future_id: FutureId) -> FutureParts:
    """What a future's id was made of; raises ValueError when it was made otherwise."""
    owner, _, seq = future_id.rpartition(":")
    return FutureParts(owner=owner, seq=int(seq))


def named_model(name: str, *, tenant: TenantId) -> str:
    """The id of a model that its owner named: the name itself for the machine's own tenant, and TENANT:NAME for others."""
    return name if tenant == LOCAL_TENANT else f"{tenant}:{name}"


def name_of(model: str) -> str:
    """What its owner calls the model with this id: the id itself, or what stands behind the tenant in it."""
    return model.rpartition(":")[2]
