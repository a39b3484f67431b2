"""docs/config.md from the settings and the tests: `python -m tools.config_docs`.

A test says which fields it tries out by a marker, on itself, its class, its module (pytestmark) or one of its parameters:

    @pytest.mark.config_field("storage_limit", "output_dir")

The sources are read, not run, so the names must be written out there.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from gradstream.shared.config.docs import as_markdown
from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.support import supported_values

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "config.md"
_TESTS = REPOSITORY / "tests"
_MARKER = "pytest.mark.config_field"


def fields_of(source: str) -> Iterator[str]:
    """The names in every config_field marker of a test file. Raises TypeError for one that is not written out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == _MARKER:
            for argument in node.args:
                if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                    raise TypeError(
                        f"line {node.lineno}: {_MARKER} takes field names as they are, not {ast.unparse(argument)}"
                    )
                yield argument.value


def fields_with_tests() -> dict[str, list[Path]]:
    """Field name to the test files that try it out, in the order of their paths."""
    found: dict[str, list[Path]] = {}
    for path in sorted(_TESTS.rglob("test_*.py")):
        for name in dict.fromkeys(fields_of(path.read_text(encoding="utf-8"))):
            found.setdefault(name, []).append(path)
    return found


def open_fields() -> set[str]:
    """Fields that have more than one value today, on CPUs or on GPUs."""
    closed = [
        {name for name, only in supported_values(device).items() if len(only.values) == 1} for device in ("cpu", "cuda")
    ]
    return {name for name, field in FIELDS.items() if field.has_choice} - (closed[0] & closed[1])


def page(tested: Mapping[str, list[Path]] | None = None) -> str:
    """The whole page."""
    places = fields_with_tests() if tested is None else tested
    return as_markdown(tested={name: ", ".join(map(_link, paths)) for name, paths in places.items()})


def _link(path: Path) -> str:
    return f"[{path.stem.removeprefix('test_')}](../{path.relative_to(REPOSITORY).as_posix()})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
