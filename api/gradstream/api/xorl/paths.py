"""Checkpoints as xorl clients name them, in every spelling that there is."""

import os
from dataclasses import dataclass
from pathlib import Path

from gradstream.api.dialect import is_name
from gradstream.api.names import SCHEME, Target, target
from gradstream.api.records import CHECKPOINT_KINDS, STORED_SCHEME
from gradstream.shared import ids
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import ModelId

WEIGHTS = "weights"
SAMPLER_WEIGHTS = "sampler_weights"
# Where the worker puts checkpoints below the output directory: checkpoints/RUN/KIND/NAME, with + for the colons of RUN.
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointName:
    """A checkpoint of the model with this id."""

    model: ModelId
    kind: str
    name: str

    @property
    def uri(self) -> str:
        """Under which the records and the worker know it."""
        return f"{STORED_SCHEME}{self.model}/{self.kind}/{self.name}"


def parse(text: str, *, of: Target, kind: str, field: str, output_dir: Path | None) -> CheckpointName:
    """The checkpoint that text names; raises InvalidRequest when it names none, or one of another kind.

    Taken are xorl://MODEL/KIND/NAME, KIND/MODEL/NAME, KIND/NAME, MODEL/NAME and NAME, a stored URI, and paths of the machine below
    output_dir. Without a model in it the request's own is meant, without a kind the given one.
    """
    found = _parts(text, output_dir=output_dir)
    run, found_kind, name = _sorted(found, of=of, kind=kind) if found is not None else (None, kind, "")
    model = None if run is None else _model(run, of=of)
    if model is None or not ids.is_valid_name(name):
        raise InvalidRequest(
            f"{field}: {text[:200]!r} does not name a checkpoint; it has the form {SCHEME}MODEL/{kind}/NAME, {kind}/NAME or NAME"
            + ("" if output_dir is None else ", or is a path below the server's output_dir")
        )
    if found_kind != kind:
        raise InvalidRequest(
            f"{field}: {text[:200]!r} is a checkpoint of kind {found_kind!r}; this call takes {kind!r}"
        )
    return CheckpointName(model=model, kind=kind, name=name)


def parse_id(text: str, *, of: Target, field: str) -> CheckpointName:
    """The checkpoint of a checkpoint_id, which is KIND/NAME or KIND/MODEL/NAME, or its URI. Raises InvalidRequest for any other text."""
    parts = text.removeprefix(SCHEME).removeprefix(STORED_SCHEME).split("/")
    kind = next((part for part in parts[:2] if part in CHECKPOINT_KINDS), None)
    if kind is None:
        kinds = ", ".join(CHECKPOINT_KINDS)
        raise InvalidRequest(
            f"{field}: {text[:200]!r} is no checkpoint_id; it has the form KIND/NAME, with KIND one of {kinds}"
        )
    return parse(text, of=of, kind=kind, field=field, output_dir=None)


def _parts(text: str, *, output_dir: Path | None) -> list[str] | None:
    """The parts between the slashes, for a path of the machine those below the output directory; None when there are none of use."""
    for scheme in (SCHEME, STORED_SCHEME):
        if text.startswith(scheme):
            parts = text.removeprefix(scheme).split("/")
            return parts if len(parts) == 3 else None
    parts = text.rstrip("/").split("/")
    if not text.startswith("/") and len(parts) <= 3:
        return parts
    if output_dir is None:
        return None
    # By its text alone: nothing on the disk is looked at, so that a path tells nothing about it.
    path = Path(os.path.normpath(Path.cwd() / text))
    if not path.is_relative_to(output_dir):
        return None
    below = list(path.relative_to(output_dir).parts)
    if below[:1] == [_CHECKPOINTS]:
        return [part.replace("+", ":") for part in below[1:]]
    return below


def _sorted(parts: list[str], *, of: Target, kind: str) -> tuple[str | None, str, str]:
    """Model, kind and name; no model when the parts make no sense."""
    match parts:
        case [name]:
            return of.model, kind, name
        case [found, name] if found in CHECKPOINT_KINDS:
            return of.model, found, name
        case [run, name]:
            return run, kind, name
        case [found, run, name] if found in CHECKPOINT_KINDS:
            return run, found, name
        case [run, found, name] if found in CHECKPOINT_KINDS:
            return run, found, name
        case _:
            return None, kind, ""


def _model(run: str, *, of: Target) -> ModelId | None:
    """The id of a model that was given by its name, or by its id; whose it is, is for the records to say."""
    if is_name(run):
        return target(run, tenant=of.tenant).model
    return ModelId(run) if ids.is_valid_id(run) else None
