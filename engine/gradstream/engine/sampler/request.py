"""What the sampler is asked, what it is doing, and what it gives back; plain data."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.sampler.choice import Choice, uniform
from gradstream.engine.sampler.stops import StopRule
from gradstream.engine.sampler.tables import TopKTable, join_tables
from gradstream.shared.errors import GradstreamError
from gradstream.shared.targets import Cells


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptQuestions:
    """What is asked about the positions of a prompt.

    logprobs of its own tokens and the topk likeliest are of the last last_n tokens (None: of all). targets: other tokens to score,
    row i at position i + 1. num_drawn tokens are drawn at each position but the first with the random numbers of key.
    """

    logprobs: bool = False
    topk: int = 0
    last_n: int | None = None
    targets: Cells | None = None
    num_drawn: int = 0
    key: bytes = b""

    @property
    def is_any(self) -> bool:
        """True when something is asked."""
        return self.logprobs or self.need_logits

    @property
    def need_logits(self) -> bool:
        """True when the log-probabilities of the whole vocabulary are needed."""
        return bool(self.topk or self.targets is not None or self.num_drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """The answers to PromptQuestions, None for what was not asked.

    logprobs: float32 [prompt length], NaN at position 0 and where not asked. topk: its row i is about position i; rows that were not
    asked are empty. targets: float32 [cells], 0.0 for an id of -1. drawn: row i is about position i + 1.
    """

    logprobs: NDArray[np.float32] | None = None
    topk: TopKTable | None = None
    targets: NDArray[np.float32] | None = None
    drawn: TopKTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One prompt, continued once for each key (its random numbers).

    name tells requests apart. adapter None is the base model. max_tokens is at least 1 and fits the context. topk_sample is 0 or how
    many candidates are wanted beside each new token.
    """

    name: str
    adapter: LoraWeights | None
    prompt: NDArray[np.int32]
    max_tokens: int
    choice: Choice
    stop: StopRule
    keys: tuple[bytes, ...]
    questions: PromptQuestions = PromptQuestions()
    topk_sample: int = 0

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def num_rows(self) -> int:
        """Rows of the cache it needs: none when the pass over the prompt answers it."""
        return self.num_samples if self.max_tokens > 1 else 0

    @property
    def longest(self) -> int:
        """Tokens that a row of it may grow to; the last new token never needs its keys."""
        return len(self.prompt) + self.max_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One finished sequence: its new tokens, the log-probability of each, and its candidates where they were asked for."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float]
    topk: TopKTable | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The answer to one request. error is set when the job failed; then the rest is empty."""

    request: SampleRequest
    sequences: list[Sampled]
    scores: PromptScores = PromptScores()
    error: GradstreamError | None = None


@dataclass(slots=True, kw_only=True)
class Progress:
    """A request that has been started, and how many were before it."""

    request: SampleRequest
    number: int
    done: dict[int, Sampled] = field(default_factory=dict)
    scores: PromptScores = PromptScores()
    error: GradstreamError | None = None

    def finished(self) -> Finished | None:
        """The answer once every sequence has ended or one has failed, else None."""
        if self.error is not None:
            return Finished(request=self.request, sequences=[], error=self.error)
        if len(self.done) < self.request.num_samples:
            return None
        return Finished(
            request=self.request,
            sequences=[self.done[index] for index in range(self.request.num_samples)],
            scores=self.scores,
        )


@dataclass(slots=True, kw_only=True)
class Sequence:
    """One sample in the making."""

    owner: Progress
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    candidates: list[TopKTable] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys are kept: the prompt and all new ones but the last."""
        return len(self.owner.request.prompt) + len(self.tokens) - 1

    @property
    def is_over(self) -> bool:
        """True when it has ended, or its request has failed."""
        return self.index in self.owner.done or self.owner.error is not None

    def uniform(self) -> float:
        """The random number of the next token."""
        return uniform(self.owner.request.keys[self.index], len(self.tokens))

    def append(self, token: int, logprob: float, candidates: TopKTable | None) -> None:
        """Take the next token, and hand the sequence in when that ends it. candidates: one row, when they are wanted."""
        request = self.owner.request
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if candidates is not None:
            self.candidates.append(candidates)
        if request.stop.ends(self.tokens):
            self._end("stop")
        elif len(self.tokens) >= request.max_tokens:
            self._end("length")

    def _end(self, reason: Literal["stop", "length"]) -> None:
        topk = join_tables(self.candidates) if self.candidates else None
        self.owner.done[self.index] = Sampled(stop_reason=reason, tokens=self.tokens, logprobs=self.logprobs, topk=topk)
