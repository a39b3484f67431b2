"""Continuous batching: requests come and go between steps, and each step continues every live sequence by one token.

A request's tokens do not depend on the others in the batch: its random numbers are its own, attention never crosses sequences, and
packing changes logits only by rounding. So one that was stopped for want of memory may begin anew, and draws the same.
"""

# Shape letters: P prompts of a pass, T tokens of a pass, D hidden, V vocabulary.

from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.models.base import BaseModel
from gradstream.engine.sampler.drawing import Drawing, Drawn
from gradstream.engine.sampler.forward import Forward
from gradstream.engine.sampler.kv import DecodePass, KVCache, PromptPass, PromptSpan
from gradstream.engine.sampler.prompts import PromptScorer
from gradstream.engine.sampler.request import Finished, Progress, SampleRequest, Sequence
from gradstream.engine.sampler.sharing import SharedPrompts
from gradstream.shared.errors import OutOfMemory

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
    """Requests that wait and sequences that live. live[i] keeps its keys and values in row i of the cache.

    A step that finds no room on the device raises torch's error with every sequence as it was, and may be repeated; `give_way` first
    makes the next steps need less.
    """

    base: BaseModel
    cache: KVCache = field(default_factory=KVCache)
    limits: SamplerLimits = field(default_factory=SamplerLimits)
    waiting: deque[SampleRequest] = field(default_factory=deque)
    live: list[Sequence] = field(default_factory=list)
    forward: Forward = field(init=False)
    drawing: Drawing = field(default_factory=Drawing)
    # Answers that no step has returned.
    ended: list[Finished] = field(default_factory=list)
    num_started: int = 0
    # How many requests the newest step tried to start, and how many one may, until nothing is left to do.
    num_starting: int = 0
    max_starting: int | None = None
    # The device has no room for another request beside those that live.
    is_full: bool = False
    # `give_way` gave back what those that are over left on the device, and no token was drawn since.
    is_tidy: bool = False

    def __post_init__(self) -> None:
        self.forward = Forward(self.base)

    def add(self, request: SampleRequest) -> None:
        """Queue a request; it starts in a later step, first come first served."""
        self.waiting.append(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.live or self.ended)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Continue every live sequence by one token and start what there is room for; the requests that ended with it.

        Raises what torch raises when the device has no room; answers that were found before that come with the next step.
        """
        self.num_starting = 0
        if self.live:
            self._decode()
        requests = self._next()
        self.num_starting = len(requests)
        if requests:
            self._prefill(requests)
        if not (self.waiting or self.live):
            self.cache.clear()
            self.forward.forget()
            self.drawing.clear()
            self.max_starting = None
        ended, self.ended = self.ended, []
        return ended

    @torch.inference_mode()
    def give_way(self, error: OutOfMemory) -> None:
        """After a step that found no room: need less in the next ones. error: the answer to a request that has no room even alone.

        Fewer requests start at a time. One that has no room beside others waits until a sequence of theirs has ended. Where those that
        live have none for their next tokens, the newest of them begins anew later. One that is alone is tried again without what others
        left, and fails when it has no room then.
        """
        if self.is_tidy or not self._has_one_request():
            self._need_less(error)
        self.is_full = self.num_starting < 2 and bool(self.live)
        self.forward.forget()
        self.drawing.clear()
        if self.live:
            self.cache.shrink(num_rows=len(self.live), num_tokens=max(sequence.num_cached for sequence in self.live))
        else:
            self.cache.clear()
        self.is_tidy = True

    def _need_less(self, error: OutOfMemory) -> None:
        if self.num_starting > 1:
            self.max_starting = self.num_starting // 2
        elif self.num_starting == 1 and not self.live:
            self.ended.append(Finished(request=self.waiting.popleft(), sequences=[], error=error))
        elif self.num_starting == 0:
            self._withdraw_newest(error)

    def _has_one_request(self) -> bool:
        """True when the newest step was for one request alone."""
        return len({id(sequence.owner) for sequence in self.live}) + self.num_starting == 1

    def _withdraw_newest(self, error: OutOfMemory) -> None:
        """Let the live request that started last wait again, or fail when it is the only one."""
        newest = max((sequence.owner for sequence in self.live), key=lambda owner: owner.number)
        if all(sequence.owner is newest for sequence in self.live):
            self.ended.append(Finished(request=newest.request, sequences=[], error=error))
        else:
            self.waiting.appendleft(newest.request)
        # Its sequences are over.
        newest.error = error
        self._release_rows()

    def _next(self) -> list[SampleRequest]:
        """The first of the waiting requests that fit."""
        chosen: list[SampleRequest] = []
        num_rows, num_tokens = len(self.live), 0
        longest = max((sequence.owner.request.longest for sequence in self.live), default=0)
        for request in islice(self.waiting, 0 if self.is_full and self.live else self.max_starting):
            num_rows += request.num_rows
            num_tokens += len(request.prompt)
            longest = max(longest, request.longest if request.num_rows else 0)
            fits = num_rows <= self.limits.max_rows and num_rows * longest <= self.limits.max_cache_tokens
            if not (fits and num_tokens <= self.limits.max_prompt_tokens) and (self.live or chosen):
                break
            chosen.append(request)
        return chosen

    def _prefill(self, requests: Several[SampleRequest]) -> None:
        """Run the prompts as one packed row, score them where asked, and draw the first token of every sample.

        A prompt that several requests have under the same adapter is in the row once. requests: the first ones that wait.
        """
        started = [Progress(request=request, number=self.num_started + row) for row, request in enumerate(requests)]
        started = _grouped(started, [progress.request.adapter for progress in started])
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
        drawn = self.drawing.draw(sequences, logits_PV[shared_N])
        for _ in started:
            self.waiting.popleft()
        self.num_started += len(started)
        self.live += [sequence for sequence in sequences if sequence.owner.request.num_rows]
        self._take(sequences, drawn)

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

    def _decode(self) -> None:
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
        drawn = self.drawing.draw(sequences, self.forward.logits(hidden_ND, adapters))
        self._take(sequences, drawn)

    def _take(self, sequences: list[Sequence], drawn: Drawn) -> None:
        """Append the tokens; from here on nothing asks the device for memory."""
        self.is_tidy = False
        drawn.give(sequences)
        self.ended += _finished(sequences)
        self._release_rows()

    def _release_rows(self) -> None:
        """Drop the sequences that are over, moving the last ones into their rows so that rows stay dense."""
        row = 0
        while row < len(self.live):
            if not self.live[row].is_over:
                row += 1
                continue
            last = self.live.pop()
            self.is_full = False
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
