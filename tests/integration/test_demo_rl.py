"""The RL demo, run as a user runs it, on the tiny model and its small rule; and the rule of the real one."""

import subprocess
from pathlib import Path

import pytest
from tests.support.example_runs import run_example
from transformers import AutoTokenizer

from examples.word_rewards import ALMOST, LETTERS, NameAWord, Prompt

REPOSITORY = Path(__file__).parent.parent.parent
TINY = REPOSITORY / "tests" / "models" / "tiny-qwen3-shakespeare"
PNG = b"\x89PNG\r\n\x1a\n"


def run_demo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_example("examples.name_a_word", "--model", "tiny", *arguments)


@pytest.mark.e2e
def test_the_reward_rises_and_is_drawn(tmp_path):
    done = run_demo("--steps", "8", "--output-dir", str(tmp_path))

    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reward.png").read_bytes().startswith(PNG)


@pytest.mark.e2e
def test_the_demo_says_that_the_reward_did_not_rise(tmp_path):
    done = run_demo("--steps", "4", "--learning-rate", "0", "--output-dir", str(tmp_path))

    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not rise" in done.stdout


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize(
    ("reply", "ends", "reward"),
    [
        pytest.param("Castle", True, 1.0, id="a word of the list"),
        pytest.param("castle", True, 1.0, id="in small letters"),
        pytest.param("Castle", False, 0.0, id="not ended"),
        pytest.param("House", True, 0.0, id="another letter"),
        pytest.param("Cxqz", True, ALMOST, id="no word"),
        pytest.param("Castle is a word", True, ALMOST, id="more than the word"),
        pytest.param("", True, 0.0, id="nothing"),
    ],
)
def test_only_a_word_alone_with_the_right_letter_is_worth_all(tokenizer, reply, ends, reward):
    tokens = tokenizer.encode(reply, add_special_tokens=False) + [tokenizer.eos_token_id] * ends

    score = NameAWord(tokenizer).score(Prompt(tokens=[], letter="C"), tokens)

    assert score.reward == reward
    assert score.word == (reply if reward == 1.0 else "")


def test_every_letter_has_many_words(tokenizer):
    words = NameAWord(tokenizer)._words

    assert min(sum(word.startswith(letter.lower()) for word in words) for letter in LETTERS) >= 140
