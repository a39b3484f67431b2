"""The Lua scripts of the job log: text and SHA-1."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class LuaScript:
    """A script as Redis gets it: its own first line (the flags), the shared functions, then its body."""

    name: str
    text: str
    sha: str


@cache
def load(name: str) -> LuaScript:
    """The script scripts/{name}.lua with the prelude put in."""
    folder = resources.files("gradstream.shared.joblog") / "scripts"
    flags, _, body = (folder / f"{name}.lua").read_text(encoding="ascii").partition("\n")
    assert flags.startswith("#!lua"), f"{name}.lua must start with its #!lua line"
    prelude = (folder / "prelude.lua").read_text(encoding="ascii")
    text = f"{flags}\n{prelude}\n{body}"
    return LuaScript(name=name, text=text, sha=hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
