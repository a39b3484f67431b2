"""The fields of Settings as data: for reading files, for messages and for the documentation."""

from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from gradstream.shared.config.settings import GROUPS, INTERNAL, SIZE, Settings
from gradstream.shared.config.sizes import format_size

_NAMES: dict[object, str] = {
    str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "a mapping", NoneType: "null"
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldInfo:
    """One field. annotation: its type with bounds, for msgspec. default: msgspec.NODEFAULT when the field is required."""

    name: str
    group: str
    annotation: Any  # a type expression
    default: object
    doc: str
    is_size: bool

    @property
    def is_required(self) -> bool:
        return self.default is msgspec.NODEFAULT

    @property
    def is_optional(self) -> bool:
        return NoneType in _union(self.annotation)

    @property
    def kinds(self) -> tuple[object, ...]:
        """The plain types a value may have, without null."""
        return tuple(_bare(part) for part in _union(self.annotation) if part is not NoneType)

    @property
    def is_text(self) -> bool:
        """True when any text is a value as it stands, without YAML's reading of it."""
        return self.kinds == (str,) or all(get_origin(kind) is Literal for kind in self.kinds)

    @property
    def has_choice(self) -> bool:
        """True when the type allows more than one value."""
        alternatives = [len(get_args(kind)) if get_origin(kind) is Literal else 2 for kind in self.kinds]
        return self.is_optional or sum(alternatives) > 1

    def expected(self) -> str:
        """What a value must be, for messages: "an integer from 1 to 512"."""
        text = " or ".join(_kind_text(kind, is_size=self.is_size) for kind in self.kinds)
        text += _bounds_text(self.annotation, is_size=self.is_size)
        return f"{text}, or null" if self.is_optional else text


def _bare(annotation: object) -> object:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _union(annotation: object) -> tuple[object, ...]:
    """The alternatives of an annotation, each with its own bounds."""
    bare = _bare(annotation)
    return get_args(bare) if get_origin(bare) in (Union, UnionType) else (annotation,)


def _metas(annotation: object) -> list[msgspec.Meta]:
    return [part for part in get_args(annotation)[1:] if isinstance(part, msgspec.Meta)]


def _kind_text(kind: object, *, is_size: bool) -> str:
    if is_size:
        return "a size such as 512MB"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return "a list of texts"
    return _NAMES[get_origin(kind) or kind]


def _bounds_text(annotation: object, *, is_size: bool) -> str:
    metas = [meta for part in _union(annotation) for meta in _metas(part)]
    return "".join(_meta_text(meta, show=format_size if is_size else str) for meta in metas)


def _meta_text(meta: msgspec.Meta, *, show: Callable[[int], str]) -> str:
    text = ""
    if meta.pattern is not None:
        text += f" that matches {meta.pattern}"
    if meta.min_length:
        text += " that is not empty"
    if meta.multiple_of is not None:
        text += f" divisible by {meta.multiple_of}"
    if meta.ge is not None and meta.le is not None:
        return f"{text} from {show(int(meta.ge))} to {show(int(meta.le))}"
    limits = (("above", meta.gt), ("at least", meta.ge), ("at most", meta.le), ("below", meta.lt))
    return text + ",".join(f" {word} {show(int(limit))}" for word, limit in limits if limit is not None)


def _table() -> dict[str, FieldInfo]:
    hints = get_type_hints(Settings, include_extras=True)
    starts = {first: title for title, first in GROUPS}
    group = ""
    table = {}
    for field in msgspec.structs.fields(Settings):
        group = starts.get(field.name, group)
        default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        meta = _metas(hints[field.name])[-1]
        table[field.name] = FieldInfo(
            name=field.name,
            group=group,
            annotation=hints[field.name],
            default=default,
            doc=meta.description or "",
            is_size=meta.extra == SIZE,
        )
    return table


_ALL = _table()
# Every field that a user can set, in the order of the documentation.
FIELDS: dict[str, FieldInfo] = {name: field for name, field in _ALL.items() if name not in INTERNAL}
