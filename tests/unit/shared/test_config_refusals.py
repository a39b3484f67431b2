"""Every value that does not exist today is refused at start, for every field that has such values."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import msgspec
import pytest

from gradstream.shared.config import ConfigError, Settings, resolve
from gradstream.shared.config.fields import FIELDS, FieldInfo
from gradstream.shared.config.machine import Machine
from gradstream.shared.config.support import supported_values

MODEL = str(Path(__file__).parents[3] / "tests/models/tiny-qwen3-shakespeare")
RESTRICTED = [(device, name) for device in ("cpu", "cuda") for name in sorted(supported_values(device))]


def some_values(field: FieldInfo) -> Iterator[object]:
    """Values that the field's type allows, some of them unlike any that a config would have."""
    if field.is_optional:
        yield None
    for kind in field.kinds:
        if choices := get_args(kind) if get_origin(kind) not in (list, dict) else ():
            yield from choices
        elif kind is bool:
            yield from (True, False)
        elif kind is int:
            yield from (field.default + 2, field.default + 4) if isinstance(field.default, int) else (2, 4)
        elif kind is float:
            yield field.default / 2 if isinstance(field.default, float) and field.default else 0.5
        elif kind is str:
            yield "elsewhere/altogether"
        else:
            yield ["other"] if get_origin(kind) is list else {"other": 1}


def refusal(device: str, name: str, value: object, tmp_path: Path) -> str:
    given = {"model_path": MODEL, "enable_lora": True, "device": device, name: value}
    settings = msgspec.convert({**given, "explicit": sorted(given)}, Settings)
    try:
        resolve(settings, Machine(num_cores=2, has_cuda=True, cache_dir=tmp_path))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("device", "name"), RESTRICTED, ids=[f"{device}-{name}" for device, name in RESTRICTED])
def test_a_value_that_does_not_exist_is_refused_with_the_ones_that_do(device, name, tmp_path):
    only = supported_values(device)[name]
    missing = [value for value in some_values(FIELDS[name]) if value not in only.values]
    assert missing, f"the entry of {name} refuses nothing; it can go"

    for value in missing:
        lines = [line for line in refusal(device, name, value, tmp_path).splitlines() if line.startswith(f"{name}: ")]
        assert len(lines) == 1, value
        assert only.why in lines[0]
        assert "; use " in lines[0]
