"""Where a checkpoint lies: its URI and its directory, a pure function of each other below one root."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import ModelId, SamplerId, is_valid_id, is_valid_name

_SCHEME = "tinker://"
# Stands before the id of an ephemeral sampler. No model can be meant: a checkpoint's URI has three parts, this one two.
_SAMPLERS = "samplers"
# Directories below the output directory.
CHECKPOINTS = "checkpoints"
SAMPLERS = "samplers"


class CheckpointKind(StrEnum):
    """weights: adapter and optimizer, to train on. sampler_weights: the adapter only. external_weights: the adapter, to download."""

    WEIGHTS = "weights"
    SAMPLER_WEIGHTS = "sampler_weights"
    EXTERNAL_WEIGHTS = "external_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A named save: tinker://{model}/{kind}/{name}."""

    model: ModelId
    kind: CheckpointKind
    name: str

    def uri(self) -> str:
        return f"{_SCHEME}{self.model}/{self.kind}/{self.name}"

    def directory(self, output_dir: Path) -> Path:
        return output_dir / CHECKPOINTS / path_part(self.model) / self.kind / self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Ephemeral:
    """A frozen adapter that belongs to one sampler and has no name: tinker://samplers/{sampler}."""

    sampler: SamplerId

    def uri(self) -> str:
        return f"{_SCHEME}{_SAMPLERS}/{self.sampler}"

    def directory(self, output_dir: Path) -> Path:
        return output_dir / SAMPLERS / self.directory_name

    @property
    def directory_name(self) -> str:
        """The last part of the directory."""
        return path_part(self.sampler)


Location = Checkpoint | Ephemeral


def checkpoint(model: ModelId, kind: CheckpointKind, name: str) -> Checkpoint:
    """The location of a named save; raises InvalidRequest unless model and name are valid parts of one."""
    if not is_valid_id(model):
        raise InvalidRequest(f"{model!r} is not a model id")
    if not is_valid_name(name):
        raise InvalidRequest(
            f"{name!r} cannot name a checkpoint; use up to 128 letters, digits, '_', '-' and single dots, beginning with a letter or digit"
        )
    return Checkpoint(model=model, kind=kind, name=name)


def ephemeral(sampler: SamplerId) -> Ephemeral:
    """The location of a sampler's own weights; raises InvalidRequest unless sampler is a valid id."""
    if not is_valid_id(sampler):
        raise InvalidRequest(f"{sampler!r} is not a sampler id")
    return Ephemeral(sampler=sampler)


def parse_uri(uri: str) -> Location:
    """The location that uri names; raises InvalidRequest when it names none."""
    match uri.removeprefix(_SCHEME).split("/") if uri.startswith(_SCHEME) else []:
        case [first, sampler] if first == _SAMPLERS:
            return ephemeral(SamplerId(sampler))
        case [model, kind, name] if kind in list(CheckpointKind):
            return checkpoint(ModelId(model), CheckpointKind(kind), name)
        case _:
            kinds = ", ".join(CheckpointKind)
            raise InvalidRequest(
                f"{uri!r} is not a checkpoint; it would be tinker://MODEL/KIND/NAME with KIND one of {kinds}"
            )


def path_part(identifier: str) -> str:
    """A valid id as one path part. '+' is no character of ids, so two ids never share a directory."""
    return identifier.replace(":", "+")
