"""A YAML file and command-line overrides to Settings; every mistake with its line and what to write instead."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from gradstream.shared.config.fields import FIELDS, FieldInfo
from gradstream.shared.config.problems import ConfigError, Problem, unknown_field
from gradstream.shared.config.settings import Settings
from gradstream.shared.config.sizes import parse_size

OVERRIDE_PREFIX = "--server."
MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Given:
    """One value as written, and where. value is what YAML made of it."""

    name: str
    value: object
    place: str


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a file with `--server.key value`, `--server.key=value` and `--server.flag` arguments on top.

    Nothing is resolved yet. Raises ConfigError with every mistake that was found.
    """
    problems: list[Problem] = []
    given = {item.name: item for item in _read_file(path, problems)}
    given |= {item.name: item for item in _read_overrides(overrides, problems)}
    values = {name: _checked(item, problems) for name, item in given.items()}
    for name, field in FIELDS.items():
        if field.is_required and name not in given:
            problems.append(Problem(str(path), f"{name} is missing: {field.doc}"))
    if problems:
        raise ConfigError(problems)
    return msgspec.convert({**values, "explicit": sorted(given)}, Settings)


def _read_file(path: Path, problems: list[Problem]) -> list[_Given]:
    node = _compose(path)
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([Problem(_place(path, node), "the file must be flat `field: value` lines")])
    given: dict[str, _Given] = {}
    for key, value in node.value:
        place = _place(path, key)
        name = str(key.value)
        if name in given:
            problems.append(Problem(place, f"{name} is set twice; the first one is {given[name].place}"))
        elif name not in FIELDS:
            problems.append(Problem(place, unknown_field(name, FIELDS)))
        else:
            given[name] = _Given(name, _construct(value), place)
    return list(given.values())


def _compose(path: Path) -> yaml.Node | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                [Problem(str(path), f"the file is larger than {MAX_FILE_BYTES} bytes; it is no server config")]
            )
        text = path.read_text(encoding="utf-8")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([Problem(str(path), f"cannot be read: {reason}")]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError([Problem(place, f"not valid YAML: {error.problem}")]) from error
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(path), f"not valid YAML: {error}")]) from error


def _construct(node: yaml.Node) -> object:
    loader = yaml.SafeLoader("")
    try:
        value: object = loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        # Left as text: the field's own check says what would be right.
        value = getattr(node, "value", None) if isinstance(node, yaml.ScalarNode) else ()
    finally:
        loader.dispose()
    return value


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def split_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The fields and texts of `--server.` arguments, as far as they are well formed; a bare flag is "true"."""
    return list(_split(arguments, []))


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> list[_Given]:
    given: dict[str, _Given] = {}
    for name, text in _split(overrides, problems):
        place = OVERRIDE_PREFIX + name
        if name not in FIELDS:
            problems.append(Problem(place, unknown_field(name, FIELDS)))
        elif name in given:
            problems.append(Problem(place, "is given twice"))
        else:
            given[name] = _Given(name, _parse(text, FIELDS[name]), place)
    return list(given.values())


def _split(arguments: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, str]]:
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(OVERRIDE_PREFIX):
            problems.append(
                Problem(argument, "unknown argument; fields of the config are set with --server.FIELD VALUE")
            )
            continue
        name, has_value, text = argument.removeprefix(OVERRIDE_PREFIX).partition("=")
        if not has_value:
            is_bare = not rest or rest[0].startswith("--")
            text = "true" if is_bare else rest.pop(0)
            if is_bare and name in FIELDS and bool not in FIELDS[name].kinds:
                problems.append(Problem(OVERRIDE_PREFIX + name, f"needs a value: {FIELDS[name].expected()}"))
                continue
        yield name, text


def _parse(text: str, field: FieldInfo) -> object:
    if field.is_optional and text in ("null", "~"):
        return None
    if field.is_text or field.is_size:
        return text
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    return "" if node is None else _construct(node)


def _checked(item: _Given, problems: list[Problem]) -> object:
    field = FIELDS[item.name]
    try:
        value: object = msgspec.convert(_adapted(item.value, field), field.annotation)
    except ValueError:
        value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem(item.place, f"{item.name}: {_shown(item.value)} is not {field.expected()}"))
    return value


def _adapted(value: object, field: FieldInfo) -> object:
    """What the user meant: a size's unit, and numbers such as 1e-5 that YAML 1.1 reads as text."""
    if not isinstance(value, str):
        return value
    if field.is_size:
        return parse_size(value)
    if field.kinds == (float,):
        return float(value)
    return value


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(msgspec.json.encode(value), "ascii")
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
