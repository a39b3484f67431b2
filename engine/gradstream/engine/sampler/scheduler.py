"""Continuous batching: requests come and go between steps, and each step continues every live sequence by one token.

A request's tokens do not depend on the others in the batch: its random numbers are its own, attention never crosses sequences, and
packing changes logits only by rounding.
"""

# Shape letters: N sequences of a step, P prompts of a pass, T tokens of a pass, D hidden, V vocabulary.

from collections import deque
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.head import logits
from gradstream.engine.models.base import BaseModel
from gradstream.engine.sampler.choice import choose, scaled_logprobs
from gradstream.engine.sampler.kv import DecodePass, KVCache, PromptPass, PromptSpan
from gradstream.engine.sampler.prompts import PromptScorer
from gradstream.engine.sampler.request import Finished, Progress, SampleRequest, Sequence
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
        """Run the prompts as one packed row, score them where asked, and draw the first token of every sample."""
        lengths_P = [len(progress.request.prompt) for progress in started]
        adapters_P = [progress.request.adapter for progress in started]
        device = self.base.device
        tokens_T = torch.cat([torch.from_numpy(progress.request.prompt.astype("int64")) for progress in started])
        positions_T = torch.cat([torch.arange(length) for length in lengths_P])
        spans = self._claim_rows(started)
        hidden_TD = self.base.hidden(
            tokens_T.to(device),
            positions_T.to(device),
            attention=PromptPass(cache=self.cache, spans=spans, packed=self.base.packed(lengths_P)),
            adapters=self._adapters(adapters_P, lengths_P),
        )
        last_P: list[int] = []
        for progress, length in zip(started, lengths_P, strict=True):
            start = last_P[-1] + 1 if last_P else 0
            last_P.append(start + length - 1)
            self._score(progress, hidden_TD[start : start + length], tokens_T[start : start + length].to(device))
        logits_PV = logits(self.base, hidden_TD[last_P], self._adapters(adapters_P, [1] * len(started)))
        sequences = [
            Sequence(owner=progress, index=index)
            for progress in started
            for index in range(progress.request.num_samples)
        ]
        shared_N = [row for row, progress in enumerate(started) for _ in range(progress.request.num_samples)]
        self._extend(sequences, logits_PV[shared_N])
        self.live += [sequence for sequence in sequences if sequence.owner.request.num_rows]
        self._release_rows()
        return _finished(sequences)

    def _claim_rows(self, started: list[Progress]) -> list[PromptSpan]:
        """Rows behind the live ones for every request that needs some; where its prompt lies in the pass and goes."""
        spans: list[PromptSpan] = []
        start, row = 0, len(self.live)
        for progress in started:
            request = progress.request
            if request.num_rows:
                span = PromptSpan(start=start, length=len(request.prompt), first_row=row, num_rows=request.num_rows)
                spans.append(span)
            start += len(request.prompt)
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
        adapters = self._adapters([sequence.owner.request.adapter for sequence in sequences], [1] * len(sequences))
        hidden_ND = self.base.hidden(
            torch.tensor([sequence.tokens[-1] for sequence in sequences], device=device),
            torch.tensor(lengths_N, device=device),
            attention=DecodePass(
                self.cache, rows=[row_of[id(sequence)] for sequence in sequences], lengths=lengths_N, device=device
            ),
            adapters=adapters,
        )
        self._extend(sequences, logits(self.base, hidden_ND, adapters))
        self._release_rows()
        return _finished(sequences)

    def _extend(self, sequences: list[Sequence], logits_NV: Tensor) -> None:
        """Draw and append one token for each sequence; a row that is not finite fails its request."""
        choices = [sequence.owner.request.choice for sequence in sequences]
        logprobs_NV = scaled_logprobs(logits_NV, choices)
        is_finite = torch.isfinite(logprobs_NV.amax(dim=-1)).tolist()
        tokens_N = choose(logprobs_NV, choices, [sequence.uniform() for sequence in sequences])
        drawn = logprobs_NV.gather(-1, tokens_N[:, None])[:, 0].tolist()
        width = max(sequence.owner.request.topk_sample for sequence in sequences)
        table = topk_table(logprobs_NV, width=width) if width else None
        for row, (sequence, token) in enumerate(zip(sequences, tokens_N.tolist(), strict=True)):
            wanted = sequence.owner.request.topk_sample
            if is_finite[row]:
                sequence.append(token, drawn[row], table.row(row, width=wanted) if table and wanted else None)
            else:
                sequence.owner.error = NonFinite(
                    f"the sampler's logits are not finite after {sequence.num_cached + 1} tokens; its weights are unusable"
                )

    def _adapters(self, adapters: list[LoraWeights | None], lengths: list[int]) -> AdapterPass:
        """One slice for each stretch of neighbours with the same adapter."""
        slices: list[tuple[int, int, LoraWeights | None]] = []
        start = 0
        for adapter, length in zip(adapters, lengths, strict=True):
            if slices and slices[-1][2] is adapter:
                slices[-1] = (slices[-1][0], start + length, adapter)
            else:
                slices.append((start, start + length, adapter))
            start += length
        return self.base.adapter_pass(slices)

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
