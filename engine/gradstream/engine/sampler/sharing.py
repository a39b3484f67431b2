"""Prompts that several requests have in common, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.sampler.request import SampleRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """Prompts end to end, each pair of tokens and adapter once. places: which of them each request has."""

    prompts: list[NDArray[np.int32]]
    adapters: list[LoraWeights | None]
    places: list[int]

    @classmethod
    def of(cls, requests: Sequence[SampleRequest]) -> "SharedPrompts":
        """Of requests of which those with one adapter are neighbours; so are their prompts."""
        known: dict[tuple[int, bytes], int] = {}
        shared = cls(prompts=[], adapters=[], places=[])
        for request in requests:
            place = known.setdefault((id(request.adapter), request.prompt.tobytes()), len(known))
            if place == len(shared.prompts):
                shared.prompts.append(request.prompt)
                shared.adapters.append(request.adapter)
            shared.places.append(place)
        return shared

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(prompt) for prompt in self.prompts]

    @property
    def starts(self) -> list[int]:
        """For each request, where its prompt begins."""
        starts = [0, *accumulate(self.lengths)]
        return [starts[place] for place in self.places]

    @property
    def ends(self) -> list[int]:
        """Each prompt's last token."""
        return [end - 1 for end in accumulate(self.lengths)]
