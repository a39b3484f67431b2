"""Sizes that keep the code readable, and the one place that reads the environment."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
SOURCE_ROOTS = ("api", "engine", "shared", "worker")
ALL_ROOTS = (*SOURCE_ROOTS, "bench", "examples", "tests", "tools")
MAX_FILE_LINES = 600
LONG_FUNCTION_LINES = 50
MAX_LONG_FUNCTION_SHARE = 0.04
ENVIRONMENT_READERS = "shared/gradstream/shared/config/"


def python_files(roots: tuple[str, ...]) -> list[Path]:
    """Hand-written Python files below the roots."""
    found = itertools.chain.from_iterable((REPOSITORY / root).rglob("*.py") for root in roots)
    return sorted(path for path in found if not path.name.endswith("_pb2.py"))


def function_lengths() -> Iterator[int]:
    for path in python_files(SOURCE_ROOTS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1


def reads_environment(tree: ast.AST) -> bool:
    """True when the code touches os.environ or os.getenv, under whatever import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}:
            return True
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        ):
            return True
    return False


def test_no_python_file_is_longer_than_the_budget():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(ALL_ROOTS)}

    assert {str(path.relative_to(REPOSITORY)): n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_few_functions_are_longer_than_a_screen():
    lengths = list(function_lengths())

    assert sum(length > LONG_FUNCTION_LINES for length in lengths) <= MAX_LONG_FUNCTION_SHARE * len(lengths)


def test_only_the_config_reads_the_environment():
    readers = [
        str(path.relative_to(REPOSITORY))
        for path in python_files(SOURCE_ROOTS)
        if reads_environment(ast.parse(path.read_text(encoding="utf-8")))
    ]

    assert [path for path in readers if not path.startswith(ENVIRONMENT_READERS)] == []


@pytest.mark.parametrize(
    "source",
    ["import os\nos.environ['A']", "import os as o\no.getenv('A')", "from os import environ"],
    ids=["attribute", "alias", "from-import"],
)
def test_the_environment_check_sees_every_spelling(source):
    assert reads_environment(ast.parse(source))
