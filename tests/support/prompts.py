"""Datums as reinforcement learning has them: several completions of each prompt."""

from collections.abc import Sequence

import numpy as np

from tests.support.engine_builders import VOCAB, Data, random_data


def prompt_data(groups: Sequence[tuple[int, Sequence[int]]], *, system: int = 0, seed: int = 0) -> Data:
    """For each (prompt length, completion lengths) that many datums, all of which begin with the same `system` tokens.

    Every datum has targets and weights of its own, on its prompt too. The completions of a prompt begin with different tokens.
    """
    rng = np.random.default_rng(seed)
    opening = rng.integers(0, VOCAB, system)
    tokens = []
    for length, completions in groups:
        prompt = rng.integers(0, VOCAB, length)
        for number, size in enumerate(completions):
            completion = rng.integers(0, VOCAB, size)
            completion[:1] = number
            tokens.append(np.concatenate([opening, prompt, completion]).astype(np.int32))
    others = random_data([len(own) for own in tokens], seed=seed + 1)
    return Data(tokens, others.targets, others.weights)


def num_unshared(data: Data) -> int:
    """Tokens of all datums."""
    return sum(map(len, data.tokens))
