"""The documents: what they link to, name and tell the reader to type exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
DOCUMENTS = sorted(
    path
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("*/*.md"))
    if ".venv" not in path.parts
)
README = REPOSITORY / "README.md"
MAX_README_LINES = 150
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `api/gradstream/api/app.py`, `bench/`, `docs/redis.md`: code spans that start at a folder of the repository.
PATH_SPAN = re.compile(
    r"`((?:api|bench|configs|docs|engine|examples|shared|tests|tools|worker)/[A-Za-z0-9_./-]*|[A-Za-z0-9_-]+\.(?:md|toml|yaml))`"
)


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def shell_lines(document: Path) -> list[str]:
    """Commands of the sh code blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_every_relative_link_resolves(document):
    targets = [link.split("#")[0] for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]

    assert [target for target in targets if target and not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_every_path_that_a_document_names_exists(document):
    named = PATH_SPAN.findall(document.read_text(encoding="utf-8"))

    assert [path for path in named if not (REPOSITORY / path).exists() and not (document.parent / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_every_make_target_that_a_document_names_exists(document):
    targets = set(
        re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    named = re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert [name for name in named if name not in targets] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_every_gradstream_command_that_a_document_shows_exists(document):
    for line in shell_lines(document):
        words = shlex.split(line.rstrip("&"))
        if not words[0].endswith("gradstream"):
            continue
        command = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word)]
        subprocess.run(
            [Path(sys.executable).with_name("gradstream"), *command, "--help"], check=True, capture_output=True
        )


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
