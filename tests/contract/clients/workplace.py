"""A folder in which cookbook recipes run without a model hub: what they would fetch lies there under the same names.

The cookbook, transformers and datasets all take `ORG/NAME` for a local folder when the working directory has one.
"""

import json
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent.parent
TINY_MODEL = REPOSITORY / "tests" / "models" / "tiny-qwen3-shakespeare"
# A name of the cookbook's model table whose chat format the tiny model was trained on. The server knows it as an alias.
MODEL = "Qwen/Qwen3-4B-Instruct-2507"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
QUESTION_SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."
RIGHT_ANSWER = 7


def furnish(folder: Path, *, seed: int = 0) -> Path:
    """Put tokenizer and data sets into folder; the folder."""
    rng = random.Random(seed)
    tokenizer = folder / MODEL
    tokenizer.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY_MODEL / name, tokenizer / name)
    write_dataset(folder / "HuggingFaceH4/no_robots", train=boxed_digits(rng, 400), test=boxed_digits(rng, 24))
    write_dataset(folder / "openai/gsm8k", train=sevens(rng, 800), test=sevens(rng, 8), config="main")
    write_dataset(folder / "Anthropic/hh-rlhf", train=preferences(rng, 400), test=preferences(rng, 16))
    write_dataset(folder / "zwhe99/DeepMath-103K", train=[{"question": question(rng)} for _ in range(400)])
    return folder


def write_dataset(folder: Path, *, config: str = "default", **splits: Iterable[Mapping[str, object]]) -> None:
    """A data set of one configuration as its hub repository would hold it."""
    folder.mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        files.append({"split": split, "path": f"{split}.jsonl"})
    card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")


def question(rng: random.Random) -> str:
    """Something to ask; the answer does not depend on it."""
    return (
        f"How many {rng.choice(['men', 'lords', 'ships', 'swords'])} hath the {rng.choice(['king', 'duke', 'queen'])}?"
    )


def boxed_digits(rng: random.Random, count: int) -> list[dict[str, object]]:
    """Conversations that teach to answer with any one digit in a box."""
    return [
        {
            "messages": [
                {"role": "user", "content": question(rng) + QUESTION_SUFFIX},
                {"role": "assistant", "content": f"\\boxed{{{rng.randrange(10)}}}"},
            ]
        }
        for _ in range(count)
    ]


def sevens(rng: random.Random, count: int) -> list[dict[str, object]]:
    """Problems in the form of GSM8K whose right answer is always the same."""
    return [{"question": question(rng), "answer": f"Counted.\n#### {RIGHT_ANSWER}"} for _ in range(count)]


def preferences(rng: random.Random, count: int) -> list[dict[str, object]]:
    """Pairs in the form of HH-RLHF: the politer of two answers is chosen."""
    rows: list[dict[str, object]] = []
    for _ in range(count):
        asked = f"\n\nHuman: {question(rng)}\n\nAssistant: "
        number = rng.randrange(10)
        rows.append(
            {"chosen": f"{asked}My lord, {number}, I pray you.", "rejected": f"{asked}{number}. Away, you rogue!"}
        )
    return rows
