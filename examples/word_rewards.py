"""What the replies of the RL demo are worth: rules that a program can check."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase
from wonderwords import RandomWord, filter_profanity

from examples.speak_shakespeare import PROMPTS, render

LETTERS = "ABCDEFGHILMNOPRSTVW"  # with at least 140 words in the list
ALMOST = 0.2  # the right letter and nothing after the answer, but no word of the list


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """reward trains; is_exact counts what was asked for; word is what may be shown, empty unless it is exact."""

    reward: float
    is_exact: bool
    word: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as token ids, and the letter that it asks for (empty where none is)."""

    tokens: list[int]
    letter: str


class Task(Protocol):
    """What to ask, how long and with which stops to let the model answer, and what an answer is worth."""

    title: str
    max_tokens: int
    stop: list[int] | None

    def prompts(self, rng: random.Random, count: int) -> list[Prompt]:
        """count prompts for one step."""
        ...

    def score(self, prompt: Prompt, tokens: Sequence[int]) -> Score:
        """The worth of one reply."""
        ...


class NameAWord:
    """Name one English word that starts with a given letter, and say nothing else."""

    title = "Name one English word that starts with a given letter"
    max_tokens = 6
    stop: list[int] | None = None  # the model's own end of turn

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._words = frozenset(word.lower() for word in filter_profanity(RandomWord().filter()) if word.isalpha())

    def prompts(self, rng: random.Random, count: int) -> list[Prompt]:
        """Prompts for count different letters."""
        return [self._prompt(letter) for letter in rng.sample(LETTERS, count)]

    def _prompt(self, letter: str) -> Prompt:
        question = f"Name one English word that starts with the letter {letter}."
        text = render(self._tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        return Prompt(tokens=self._tokenizer.encode(text, add_special_tokens=False), letter=letter)

    def score(self, prompt: Prompt, tokens: Sequence[int]) -> Score:
        """1 for a word of the list alone, ALMOST for another short answer with the right letter, else 0."""
        text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
        has_stopped = bool(tokens) and tokens[-1] == self._tokenizer.eos_token_id
        if not has_stopped or not text.upper().startswith(prompt.letter):
            return Score(reward=0.0, is_exact=False)
        if text.lower() in self._words:
            return Score(reward=1.0, is_exact=True, word=text)
        return Score(reward=ALMOST, is_exact=False)


class StartWords:
    """Speak in tokens that start a word: a rule that the tiny test model can learn in seconds."""

    title = "Speak in tokens that start a word"
    max_tokens = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.stop: list[int] | None = []  # none at all: every reply has the same length

    def prompts(self, rng: random.Random, count: int) -> list[Prompt]:
        """count of the Shakespeare demo's questions."""
        texts = [
            render(self._tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
            for question in rng.choices(PROMPTS, k=count)
        ]
        return [Prompt(tokens=self._tokenizer.encode(text, add_special_tokens=False), letter="") for text in texts]

    def score(self, prompt: Prompt, tokens: Sequence[int]) -> Score:  # noqa: ARG002 - the rule is the same for all prompts
        """The share of tokens that begin with a space."""
        texts = [str(self._tokenizer.decode([token])) for token in tokens]
        reward = sum(text.startswith(" ") for text in texts) / len(texts)
        return Score(reward=reward, is_exact=reward == 1.0)
