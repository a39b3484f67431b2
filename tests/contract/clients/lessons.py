"""Conversations that teach the form of the answers which the cookbook's RL recipes reward: one digit in a box.

Run inside the cookbook's environment, since the recipes' own few-shot turns stand before each question: python lessons.py FILE
"""

import json
import random
import sys
from pathlib import Path

from tinker_cookbook.recipes.math_rl.math_env import Gsm8kDataset, MathEnv

QUESTIONS = 400
# Every digit, the right one of `workplace.py` in a third of the cases: were it rarer, a model could unlearn it by chance, and a
# reward that never comes teaches nothing.
DIGITS = (*range(10), 7, 7, 7, 7)


def few_shot(suffix: str) -> list[dict[str, str]]:
    """The turns that a recipe puts before the question, with its own ending of questions."""
    turns = [dict(turn) for turn in MathEnv.standard_fewshot_prefix()]
    for turn in turns:
        turn["content"] = turn["content"].replace(MathEnv.question_suffix(), suffix)
    return turns


def conversation(rng: random.Random) -> dict[str, object]:
    """One question in the words of one of the recipes, and its answer."""
    suffix = rng.choice([MathEnv.question_suffix(), Gsm8kDataset.question_suffix()])
    asked = (
        f"How many {rng.choice(['men', 'lords', 'ships', 'swords'])} hath the {rng.choice(['king', 'duke', 'queen'])}?"
    )
    return {
        "messages": [
            *few_shot(suffix),
            {"role": "user", "content": asked + suffix},
            {"role": "assistant", "content": f"\\boxed{{{rng.choice(DIGITS)}}}"},
        ]
    }


if __name__ == "__main__":
    generator = random.Random(0)
    lines = [json.dumps(conversation(generator)) for _ in range(QUESTIONS)]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
