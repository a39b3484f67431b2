"""Settings as text for people: the reference of all fields, and one server's values."""

from collections.abc import Iterator
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
in use. Sizes are written as `512MB` or `10TB` (powers of 1024); field names ending in `_s` are seconds.

The last column says what exists today. Where it names other values than the default, the first of them is used (and said so
at start) unless the field is set; a value that is not named is refused at start.

This page is made by `gradstream config docs`.
"""


def as_markdown() -> str:
    """docs/config.md."""
    return _HEAD + "".join(
        _chapter(title, list(fields)) for title, fields in groupby(FIELDS.values(), lambda f: f.group)
    )


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


def _chapter(title: str, fields: list[FieldInfo]) -> str:
    rows = "".join(
        f"| `{field.name}` | {_default(field)} | {_cell(field.doc)} | {_cell(_today(field))} |\n" for field in fields
    )
    return f"\n## {title}\n\n| field | default | meaning | today |\n|---|---|---|---|\n{rows}"


def _default(field: FieldInfo) -> str:
    if field.is_required:
        return "required"
    return f"`{_written(field.default, field)}`"


def _today(field: FieldInfo) -> str:
    if field.name in ZMQ:
        return "accepted, no effect: Redis takes the place of ZMQ"
    if field.name == "enable_lora":
        return "must be set to `true`"
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
