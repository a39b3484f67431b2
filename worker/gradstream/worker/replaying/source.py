"""What a replay reads: a server's log, snapshots and checkpoints, or an exported file; and how the engine was set up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from gradstream.engine.config import EngineConfig
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.config import Settings, load_settings, read_handover, resolve
from gradstream.shared.config.machine import Machine
from gradstream.worker.disklog.archive import import_log
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.facts import facts
from gradstream.worker.inspect.log_source import open_log
from gradstream.worker.inspect.place import CannotLook, Place, find_place
from gradstream.worker.model_dir import model_directory
from gradstream.worker.parts import engine_config
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.fingerprints import adopted
from gradstream.worker.run_dir import RunDir

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What the user named. file: an exported log, read instead of the server's. model_path: instead of the one in the config."""

    config: Path | None = None
    output_dir: Path | None = None
    engine: str | None = None
    file: Path | None = None
    model_path: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """name: for messages. snapshots None: there can be none. checkpoints: an output_dir to read from, None when none is known.

    settings None: only a recorded run can be looked at, since no model is known. is_export: an exported file, not a server's log.
    """

    name: str
    log: DiskLog
    snapshots: SnapshotStore | None
    checkpoints: Path | None
    settings: Settings | None
    is_export: bool = False


@contextmanager
def open_source(where: Where, *, scratch: Path) -> Iterator[Source]:
    """The log that is meant; an exported file is unpacked below scratch. Raises CannotLook, ConfigError, LogDamaged."""
    if where.device is not None and where.device not in _DEVICES:
        raise CannotLook(f"--device: {where.device!r} is none of {', '.join(_DEVICES)}")
    place = None
    if where.config is not None or where.output_dir is not None:
        place = find_place(config=where.config, output_dir=where.output_dir, engine=where.engine)
    elif where.file is None:
        raise CannotLook("give --config FILE or --output-dir DIR of a server, or --log FILE of an exported log")
    settings = _settings(where, place)
    if where.file is not None:
        directory = scratch / "joblog"
        try:
            import_log(where.file, directory)
        except OSError as error:
            raise CannotLook(f"--log: {where.file} cannot be read: {error.strerror}") from error
        checkpoints = None if place is None else place.output_dir
        yield Source(
            name=str(where.file),
            log=DiskLog(directory),
            snapshots=None,
            checkpoints=checkpoints,
            settings=settings,
            is_export=True,
        )
        return
    assert place is not None, "checked above"
    yield Source(
        name=str(place.joblog_dir),
        log=open_log(place.joblog_dir),
        snapshots=SnapshotStore(place.snapshots_dir),
        checkpoints=place.directory,
        settings=settings,
    )


def engine_settings(source: Source, *, fingerprint: str, base_models: list[str], output_dir: Path) -> EngineConfig:
    """The engine of the log, as far as its settings and its fingerprint tell, working in output_dir. Raises CannotReplay, ConfigError."""
    settings = source.settings
    if settings is None and source.is_export:
        named = f" ({', '.join(base_models)})" if base_models else ""
        raise CannotReplay(
            f"an exported log does not hold the base model{named}: give --model-path DIR, where it lies here, or --config FILE of "
            "a server that has it"
        )
    if settings is None:
        raise CannotReplay(
            "the base model is not known: the server's settings are not in its output directory any more; "
            "give --config FILE (what it was started with) or --model-path DIR"
        )
    config = engine_config(settings, model_path=model_directory(settings.model_path))
    names = dict.fromkeys((*base_models, config.model_name, *config.model_aliases))
    config = replace(
        adopted(config, fingerprint),
        output_dir=output_dir,
        storage_limit_bytes=None,
        # What the models of the log were made on comes first: it is written into what they save.
        model_name=next(iter(names)),
        model_aliases=tuple(names)[1:],
    )
    if config.device != "cpu" and not torch.cuda.is_available():
        wanted = facts(fingerprint).get("device", config.device)
        raise CannotReplay(
            f"the log was written on {wanted}, which is not here; --device cpu with --tolerant X can come close"
        )
    return config


def _settings(where: Where, place: Place | None) -> Settings | None:
    """The settings that a running server noted, else those of the config, else defaults for --model-path; None without any."""
    noted = None if place is None or place.output_dir is None else RunDir(place.output_dir).settings_file
    if noted is not None and noted.exists():
        # As a launcher resolved them.
        return _with_wishes(read_handover(noted), where)
    if where.config is not None:
        settings = load_settings(where.config)
    elif where.model_path is not None:
        explicit = frozenset({"model_path", "enable_lora"})
        settings = Settings(model_path=where.model_path, enable_lora=True, explicit=explicit)
    else:
        return None
    return resolve(_with_wishes(settings, where), Machine.here()).settings


def _with_wishes(settings: Settings, where: Where) -> Settings:
    if where.model_path is not None:
        settings = msgspec.structs.replace(settings, model_path=where.model_path)
    return settings if where.device is None else msgspec.structs.replace(settings, device=where.device)
