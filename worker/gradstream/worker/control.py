"""What rank 0 tells the other ranks: one message at a time over a gloo group, the same code for one rank and many.

A message is three broadcasts: int64 [2] (bytes of the header, bytes of the payloads), the header (msgpack of a Message), and
one flat uint8 tensor with all job payloads end to end, left out when it is empty. Nothing is pickled.
"""

from datetime import timedelta
from itertools import accumulate
from typing import Self

import msgspec
import torch
import torch.distributed as dist

from gradstream.shared.wire import Batch

# Followers wait in a broadcast while rank 0 has nothing to say. It says so every IDLE_TICK_S, far below the timeout, which must
# outlast the longest op that rank 0 alone is busy with.
IDLE_TICK_S = 1.0
TIMEOUT_S = 30 * 60.0


class RunBatch(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """Execute this batch. On the wire its jobs have empty payloads; payload_bytes gives the length of each in the flat tensor."""

    batch: Batch
    payload_bytes: list[int]


class Idle(msgspec.Struct, frozen=True, kw_only=True, tag="idle"):
    """Nothing to do; wait for the next message."""


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Leave the loop and exit with status 0."""


Message = RunBatch | Idle | Stop

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Control:
    """One end of the control channel. group None: a gang of one rank, where sending reaches nobody."""

    def __init__(self, *, rank: int, num_ranks: int, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._group = group

    @classmethod
    def open(cls) -> Self:
        """The channel among the ranks of the initialised default group, or of one rank when there is none."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(rank=0, num_ranks=1, group=None)
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
        return cls(rank=dist.get_rank(), num_ranks=dist.get_world_size(), group=group)

    def run(self, batch: Batch) -> None:
        """Rank 0: have every follower execute batch."""
        payloads = [job.payload for job in batch.jobs]
        bare = msgspec.structs.replace(batch, jobs=[msgspec.structs.replace(job, payload=b"") for job in batch.jobs])
        self._send(RunBatch(batch=bare, payload_bytes=[len(payload) for payload in payloads]), payloads)

    def idle(self) -> None:
        """Rank 0: keep the followers' wait alive."""
        self._send(Idle(), [])

    def stop(self) -> None:
        """Rank 0: end the followers' loops."""
        self._send(Stop(), [])

    def receive(self) -> Batch | Idle | Stop:
        """Followers: the next message; a batch comes with its payloads. Raises RuntimeError when rank 0 is gone."""
        sizes = torch.empty(2, dtype=torch.int64)
        self._broadcast(sizes)
        header_bytes, payload_bytes = sizes.tolist()
        header = torch.empty(header_bytes, dtype=torch.uint8)
        self._broadcast(header)
        message = _DECODER.decode(header.numpy().data)
        flat = torch.empty(payload_bytes, dtype=torch.uint8)
        if payload_bytes:
            self._broadcast(flat)
        match message:
            case RunBatch(batch=batch, payload_bytes=lengths):
                return _with_payloads(batch, flat.numpy().data, lengths)
            case Idle() | Stop():
                return message

    def _send(self, message: Message, payloads: list[bytes]) -> None:
        if self._group is None:
            return
        header = bytearray(_ENCODER.encode(message))
        # One copy, so that the gang sees one tensor whatever the number of jobs.
        flat = bytearray().join(payloads)
        self._broadcast(torch.tensor([len(header), len(flat)], dtype=torch.int64))
        self._broadcast(torch.frombuffer(header, dtype=torch.uint8))
        if flat:
            self._broadcast(torch.frombuffer(flat, dtype=torch.uint8))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        assert self._group is not None, "a gang of one rank has nobody to receive from"
        dist.broadcast(tensor, src=0, group=self._group)


def _with_payloads(batch: Batch, flat: memoryview, lengths: list[int]) -> Batch:
    ends = list(accumulate(lengths))
    jobs = [
        msgspec.structs.replace(job, payload=bytes(flat[end - length : end]))
        for job, length, end in zip(batch.jobs, lengths, ends, strict=True)
    ]
    return msgspec.structs.replace(batch, jobs=jobs)
