"""Settings as text for people: the reference of all fields, and one server's values."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from urllib.parse import urlsplit, urlunsplit

import msgspec
import yaml

from gradstream.shared.config.fields import FIELDS, FieldInfo
from gradstream.shared.config.settings import Settings
from gradstream.shared.config.sizes import format_size
from gradstream.shared.config.support import CPU_DEFAULTS, EMBEDDED, ZMQ, supported_values

_HEAD = """# Server configuration

A server's config is one flat YAML file: `field: value` lines. Each field can also be set on the command line, which wins over the
file: `gradstream serve --config FILE --server.FIELD VALUE` (or `--server.FIELD=VALUE`, or `--server.FLAG` for a true one).
An unknown field, a field set twice and a value that cannot be had are errors; nothing is ignored.

`gradstream config check FILE` says whether a config can be served on this machine, `gradstream config show FILE` prints every value
in use; both take `--server.FIELD` arguments, too. Sizes are written as `512MB` or `10TB` (powers of 1024); field names ending in
`_s` are seconds.

The column "today" says what exists. Where it names other values than the default, the first of them is used (and said so
at start) unless the field is set; a value that is not named is refused at start.
"""
_TESTED = """The last column links the tests that try a field out; that a value which is not named is refused is tested for every field in
[config_refusals](../tests/unit/shared/test_config_refusals.py).

This page is made by `python -m tools.config_docs`.
"""


def as_markdown(*, tested: Mapping[str, str] | None = None) -> str:
    """The reference of all fields. tested: what to say of a field's tests, by name; None leaves that column out."""
    head = _HEAD if tested is None else _HEAD + "\n" + _TESTED
    chapters = groupby(FIELDS.values(), lambda field: field.group)
    return head + "".join(_chapter(title, list(fields), tested) for title, fields in chapters)


def as_yaml(settings: Settings) -> str:
    """Every field with its value, those that the user wrote marked. Loads again as a config, but for the password of redis_url."""
    lines = []
    for name, field in FIELDS.items():
        value = getattr(settings, name)
        if name == "redis_url" and value is not None:
            value = _without_password(value)
        text = _written(value, field)
        unused = "# " if settings.redis_url is not None and name in EMBEDDED else ""
        lines.append(f"{unused}{name}: {text}{'  # set' if name in settings.explicit else ''}\n")
    return "".join(lines)


def _chapter(title: str, fields: list[FieldInfo], tested: Mapping[str, str] | None) -> str:
    columns = ["field", "default", "meaning", "today"] + (["tested"] if tested is not None else [])
    rows = "".join(_row(field, tested) for field in fields)
    return f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n{rows}"


def _row(field: FieldInfo, tested: Mapping[str, str] | None) -> str:
    row = f"| `{field.name}` | {_default(field)} | {_cell(field.doc)} | {_cell(_today(field))} |"
    return f"{row}\n" if tested is None else f"{row} {tested.get(field.name, '')} |\n"


def _default(field: FieldInfo) -> str:
    if field.is_required:
        return "required"
    return f"`{_written(field.default, field)}`"


def _today(field: FieldInfo) -> str:
    if field.name in ZMQ:
        return "accepted, no effect: Redis takes the place of ZMQ"
    parts = list(_limits(field))
    if field.name in CPU_DEFAULTS:
        parts.append(f"CPU default `{_inline(CPU_DEFAULTS[field.name])}`")
    return "; ".join(parts) or field.expected()


def _limits(field: FieldInfo) -> Iterator[str]:
    on_cpu, on_cuda = supported_values("cpu").get(field.name), supported_values("cuda").get(field.name)
    shared = on_cpu is not None and on_cuda is not None and on_cpu.values == on_cuda.values
    for only, place in ((on_cpu, "" if shared else " on CPUs"), (None if shared else on_cuda, " on GPUs")):
        if only is not None:
            yield f"{' or '.join(f'`{_written(value, field)}`' for value in only.values)} only{place}"


def _written(value: object, field: FieldInfo) -> str:
    return format_size(value) if field.is_size and isinstance(value, int) else _inline(value)


def _inline(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str) and value != "":
        text = yaml.safe_dump(value, width=10_000).removesuffix("...\n")
        return text.strip()
    return msgspec.json.encode(value).decode()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))
