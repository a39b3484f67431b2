"""A worker without an engine: it answers every job at once, or holds them until it is told to end all of them in one batch.

Run by bench.edge: python -m bench.edge_worker --redis URL. Commands come as lines on stdin (hold, release, answer), answers go as JSON
lines to stdout.
"""

import argparse
import json
import os
import select
import sys
import time

import msgspec

from bench.edge_bodies import CONTEXT_TOKENS, VOCAB_SIZE
from gradstream.shared.catalog import EngineCard, LossCard, LossInput
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import Commit, Ended, LogEntry, RecordKind, RecordWrite
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.wire import CreateModelDone, ForwardBackwardDone, Job, OptimStepDone, Outcome

MODEL_NAME = "bench/edge"
_TARGETS = LossInput(name="target_tokens", dtype="int64")
CARD = EngineCard(
    model_name=MODEL_NAME,
    model_aliases=[],
    tokenizer_id="bench/edge",
    architecture="BenchForCausalLM",
    vocab_size=VOCAB_SIZE,
    max_context_tokens=CONTEXT_TOKENS,
    max_lora_rank=64,
    num_ranks=1,
    epoch=1,
    fingerprint="edge-1",
    losses=[
        LossCard(
            name="cross_entropy",
            inputs=[_TARGETS, LossInput(name="weights", dtype="float32", required=False, default=1.0)],
        ),
        LossCard(
            name="importance_sampling",
            inputs=[
                _TARGETS,
                LossInput(name="logprobs", dtype="float32"),
                LossInput(name="advantages", dtype="float32"),
            ],
        ),
    ],
)
_READ_MS = 20
_COUNT = 512


class Worker:
    """Reads the log in order. number: of the last batch."""

    def __init__(self, feed: RedisFeed) -> None:
        self._feed = feed
        self._epoch = feed.acquire(owner="bench")
        feed.publish_card(msgspec.structs.replace(CARD, epoch=self._epoch), epoch=self._epoch)
        self._cursor = feed.cursor()
        self._number = 0
        self._held: list[LogEntry] = []
        self._is_holding = False

    def serve(self) -> None:
        """Until stdin ends."""
        renewed_s = 0.0
        while True:
            if time.monotonic() - renewed_s > 1:
                self._feed.renew(self._epoch)
                renewed_s = time.monotonic()
            if _is_told() and not self._obey(sys.stdin.readline().strip()):
                return
            for entry in self._feed.read(self._cursor, count=_COUNT, block_ms=_READ_MS):
                self._cursor = entry.entry_id
                if not entry.is_open:
                    continue
                self._held.append(entry)
                if not self._is_holding:
                    self._commit()

    def _obey(self, command: str) -> bool:
        match command:
            case "hold":
                self._is_holding = True
                _say({"holding": True})
            case "release":
                started = time.monotonic()
                count = len(self._held)
                self._commit()
                _say({"released": count, "started_s": started, "commit_s": time.monotonic() - started})
            case "answer":
                self._is_holding = False
                self._commit()
                _say({"holding": False})
            case _:
                return False
        return True

    def _commit(self) -> None:
        if not self._held:
            return
        entries, self._held = self._held, []
        self._number += 1
        records = [
            RecordWrite(kind=RecordKind.MODEL, record_id=entry.job.owner, fields={"state": "ready"})
            for entry in entries
            if entry.job.op == "create_model"
        ]
        self._feed.commit(
            Commit(
                epoch=self._epoch,
                number=self._number,
                outcomes=[Ended.of(entry.job, _outcome(entry.job)) for entry in entries],
                plan=b"plan",
                cursor=self._cursor,
                records=records,
            )
        )


def _outcome(job: Job) -> Outcome:
    match job.op:
        case "create_model":
            return CreateModelDone(model_id=ModelId(job.owner))
        case "forward_backward":
            return ForwardBackwardDone(outputs={}, metrics={"loss:sum": 1.0})
        case _:
            return OptimStepDone(metrics={"grad_norm": 1.0})


def _is_told() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True)
    options = parser.parse_args()
    with RedisFeed(options.redis) as feed:
        worker = Worker(feed)
        _say({"ready": os.getpid()})
        worker.serve()


if __name__ == "__main__":
    main()
