"""Continuous batching: requests come and go between steps, and each step continues every live sequence by one token.

A request's tokens do not depend on the others in the batch: its random numbers are its own, attention never crosses sequences, and
packing changes logits only by rounding.
"""

# Shape letters: N sequences of a step, P prompts of a pass, T tokens of a pass, D hidden, V vocabulary.

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.models.base import BaseModel
from gradstream.engine.sampler.choice import choose, scaled_logits
from gradstream.engine.sampler.forward import Forward
from gradstream.engine.sampler.kv import DecodePass, KVCache, PromptPass, PromptSpan
from gradstream.engine.sampler.prompts import PromptScorer
from gradstream.engine.sampler.request import Finished, Progress, SampleRequest, Sequence
from gradstream.engine.sampler.sharing import SharedPrompts
from gradstream.engine.sampler.tables import topk_table
from gradstream.shared.errors import NonFinite

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerLimits:
    """What a sampler holds at a time; one request alone may exceed them, else it could never run.

    max_rows: live sequences. max_cache_tokens: rows times the longest that one of them may grow to. max_prompt_tokens: tokens of
    one packed pass over prompts.
    """

    max_rows: int = 64
    max_cache_tokens: int = 131_072
    max_prompt_tokens: int = 8_192


@dataclass(slots=True, kw_only=True)
class SamplerEngine:
    """Requests that wait and sequences that live. live[i] keeps its keys and values in row i of the cache."""

    base: BaseModel
    cache: KVCache = field(default_factory=KVCache)
    limits: SamplerLimits = field(default_factory=SamplerLimits)
    waiting: deque[SampleRequest] = field(default_factory=deque)
    live: list[Sequence] = field(default_factory=list)
    forward: Forward = field(init=False)
    # Probabilities of a step; pages of a fresh tensor cost more than what is written to them.
    scratch: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.forward = Forward(self.base)

    def add(self, request: SampleRequest) -> None:
        """Queue a request; it starts in a later step, first come first served."""
        self.waiting.append(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.live)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Continue every live sequence by one token and start what there is room for; the requests that ended with it."""
        finished = self._decode() if self.live else []
        started = self._admit()
        if started:
            finished += self._prefill(started)
        if not self.has_work():
            self.cache.clear()
            self.forward.forget()
            self.scratch = torch.empty(0)
        return finished

    def _admit(self) -> list[Progress]:
        """The first of the waiting requests that fit."""
        started: list[Progress] = []
        num_rows, num_tokens = len(self.live), 0
        longest = max((sequence.owner.request.longest for sequence in self.live), default=0)
        while self.waiting:
            request = self.waiting[0]
            num_rows += request.num_rows
            num_tokens += len(request.prompt)
            longest = max(longest, request.longest if request.num_rows else 0)
            fits = num_rows <= self.limits.max_rows and num_rows * longest <= self.limits.max_cache_tokens
            if not (fits and num_tokens <= self.limits.max_prompt_tokens) and (self.live or started):
                break
            started.append(Progress(request=self.waiting.popleft()))
        return _grouped(started, [progress.request.adapter for progress in started])

    def _prefill(self, started: list[Progress]) -> list[Finished]:
        """Run the prompts as one packed row, score them where asked, and draw the first token of every sample.

        A prompt that several requests have under the same adapter is in the row once.
        """
        prompts = SharedPrompts.of([progress.request for progress in started])
        device = self.base.device
        tokens_T = torch.from_numpy(np.concatenate(prompts.prompts)).to(device, torch.int64)
        positions_T = torch.cat([torch.arange(length) for length in prompts.lengths])
        hidden_TD = self.forward.hidden(
            tokens_T,
            positions_T.to(device),
            attention=PromptPass(
                cache=self.cache, spans=self._claim_rows(started, prompts), packed=self.base.packed(prompts.lengths)
            ),
            adapters=self.forward.adapters(prompts.adapters, prompts.lengths),
            # What is said about a prompt has the bits of training.
            is_exact=any(progress.request.questions.is_any for progress in started),
        )
        for progress, start in zip(started, prompts.starts, strict=True):
            span = slice(start, start + len(progress.request.prompt))
            self._score(progress, hidden_TD[span], tokens_T[span])
        adapters = self.forward.adapters(prompts.adapters, [1] * len(prompts.lengths))
        logits_PV = self.forward.logits(hidden_TD[prompts.ends], adapters)
        sequences = [
            Sequence(owner=progress, index=index)
            for progress in started
            for index in range(progress.request.num_samples)
        ]
        shared_N = [
            place
            for progress, place in zip(started, prompts.places, strict=True)
            for _ in range(progress.request.num_samples)
        ]
        self._extend(sequences, logits_PV[shared_N])
        self.live += [sequence for sequence in sequences if sequence.owner.request.num_rows]
        self._release_rows()
        return _finished(sequences)

    def _claim_rows(self, started: list[Progress], prompts: SharedPrompts) -> list[PromptSpan]:
        """Rows behind the live ones for every request that needs some; where its prompt lies in the pass and goes."""
        spans: list[PromptSpan] = []
        row = len(self.live)
        for progress, start in zip(started, prompts.starts, strict=True):
            request = progress.request
            if request.num_rows:
                span = PromptSpan(start=start, length=len(request.prompt), first_row=row, num_rows=request.num_rows)
                spans.append(span)
            row += request.num_rows
        lengths = [span.length for span in spans] + [sequence.num_cached for sequence in self.live]
        self._reserve(num_rows=row, num_tokens=max(lengths, default=0))
        return spans

    def _reserve(self, *, num_rows: int, num_tokens: int) -> None:
        self.cache.reserve(num_rows=num_rows, num_tokens=num_tokens, max_places=self.limits.max_cache_tokens)

    def _score(self, progress: Progress, hidden_TD: Tensor, tokens_T: Tensor) -> None:
        request = progress.request
        progress.scores = PromptScorer(
            self.base, request.adapter, questions=request.questions, choice=request.choice
        ).scores(hidden_TD, tokens_T)

    def _decode(self) -> list[Finished]:
        """Run the newest token of every live sequence and draw the next ones."""
        row_of = {id(sequence): row for row, sequence in enumerate(self.live)}
        sequences = _grouped(self.live, [sequence.owner.request.adapter for sequence in self.live])
        lengths_N = [sequence.num_cached for sequence in sequences]
        self._reserve(num_rows=len(self.live), num_tokens=max(lengths_N) + 1)
        device = self.base.device
        adapters = self.forward.adapters([one.owner.request.adapter for one in sequences], [1] * len(sequences))
        hidden_ND = self.forward.hidden(
            torch.tensor([sequence.tokens[-1] for sequence in sequences], device=device),
            torch.tensor(lengths_N, device=device),
            attention=DecodePass(
                self.cache, rows=[row_of[id(sequence)] for sequence in sequences], lengths=lengths_N, device=device
            ),
            adapters=adapters,
        )
        self._extend(sequences, self.forward.logits(hidden_ND, adapters))
        self._release_rows()
        return _finished(sequences)

    def _extend(self, sequences: list[Sequence], logits_NV: Tensor) -> None:
        """Draw and append one token for each sequence; a row that is not finite fails its request."""
        choices = [sequence.owner.request.choice for sequence in sequences]
        logits_NV = scaled_logits(logits_NV, choices)
        probs_NV = self._softmax(logits_NV)
        tokens_N = choose(probs_NV, choices, [sequence.uniform() for sequence in sequences])
        # A row that is not finite has no probabilities either. One transfer for both.
        chosen_N = torch.stack([tokens_N.double(), probs_NV.gather(-1, tokens_N[:, None])[:, 0].log().double()])
        tokens, logprobs = chosen_N.tolist()
        width = max(sequence.owner.request.topk_sample for sequence in sequences)
        table = topk_table(torch.log_softmax(logits_NV, dim=-1), width=width) if width else None
        for row, (sequence, token, logprob) in enumerate(zip(sequences, tokens, logprobs, strict=True)):
            wanted = sequence.owner.request.topk_sample
            if math.isfinite(logprob):
                sequence.append(int(token), logprob, table.row(row, width=wanted) if table and wanted else None)
            else:
                sequence.owner.error = NonFinite(
                    f"the sampler's logits are not finite after {sequence.num_cached + 1} tokens; its weights are unusable"
                )

    def _softmax(self, logits_NV: Tensor) -> Tensor:
        """float32 [N, V], valid until the next call."""
        if self.scratch.numel() < logits_NV.numel():
            self.scratch = torch.empty_like(logits_NV).flatten()
        probs_NV = self.scratch[: logits_NV.numel()].view_as(logits_NV)
        return torch.softmax(logits_NV, dim=-1, out=probs_NV)

    def _release_rows(self) -> None:
        """Drop the sequences that are over, moving the last ones into their rows so that rows stay dense."""
        row = 0
        while row < len(self.live):
            if not self.live[row].is_over:
                row += 1
                continue
            last = self.live.pop()
            if row < len(self.live):
                if not last.is_over:
                    self.cache.move(source=len(self.live), target=row, num_tokens=last.num_cached)
                self.live[row] = last


def _grouped(items: list[T], adapters: list[LoraWeights | None]) -> list[T]:
    """items with those of one adapter together, adapters in order of first appearance."""
    order: dict[int, int] = {}
    ranks = [order.setdefault(id(adapter), len(order)) for adapter in adapters]
    return [items[index] for index in sorted(range(len(items)), key=lambda index: ranks[index])]


def _finished(sequences: list[Sequence]) -> list[Finished]:
    """The answers of the requests that ended with these sequences, each once."""
    owners = {id(sequence.owner): sequence.owner for sequence in sequences}
    return [answer for owner in owners.values() if (answer := owner.finished()) is not None]
