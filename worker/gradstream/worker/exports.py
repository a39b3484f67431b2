"""The rq task that makes one export. Repeating it at any point gives the same export, whole or not there at all.

It runs in a process forked for it alone: torch and the base model go with that process, and a hard end costs nobody else.
"""

import json
import shutil
from pathlib import Path

import structlog

from gradstream.engine.checkpoint.budget import DiskBudget
from gradstream.engine.checkpoint.huggingface import Family
from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import Manifest, read_manifest
from gradstream.engine.checkpoint.merge import merge_checkpoint, merged_size_bytes
from gradstream.shared.clock import SystemClock
from gradstream.shared.config import ConfigError, Settings, read_handover
from gradstream.shared.errors import GradstreamError, InvalidRequest, UnknownModel
from gradstream.shared.exports import OPEN, ExportState, export_directory
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.port import RecordKind
from gradstream.worker.model_dir import model_directory
from gradstream.worker.parts import redis_url

_REPORT_EVERY_S = 1.0

_log = structlog.get_logger(__name__)


class _Withdrawn(Exception):
    """The export's record is gone: nobody wants it any more."""


def make_export(settings_file: str, export: str) -> None:
    """Make the export that a record asks for, and write into the record what came of it."""
    settings = read_handover(Path(settings_file))
    with RedisCensus(redis_url(settings), engine=settings.engine_name) as census:
        record = census.record(RecordKind.EXPORT, export)
        if record is None or record.get("state") not in OPEN:
            return
        num_starts = census.count_up(RecordKind.EXPORT, export, "num_starts")
        report = _Report(census, export)
        try:
            report(ExportState.RUNNING, error="")
            directory = _merged(settings, export, record, report=report)
            files = {
                str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()
            }
            report(
                ExportState.DONE,
                progress="1",
                files=json.dumps(files, sort_keys=True),
                size_bytes=str(sum(files.values())),
            )
            _log.info(
                "export_done",
                export_id=export,
                path=record["path"],
                size_bytes=sum(files.values()),
                num_starts=num_starts,
            )
        except (GradstreamError, ConfigError) as error:
            _log.warning("export_failed", export_id=export, path=record["path"], reason=str(error))
            census.change(RecordKind.EXPORT, export, {"state": ExportState.FAILED, "error": str(error)})
        except _Withdrawn:
            shutil.rmtree(Path(settings.output_dir, export_directory(export)), ignore_errors=True)
            _log.info("export_withdrawn", export_id=export, path=record["path"])


class _Report:
    """Writes into an export's record; raises _Withdrawn when there is none any more."""

    def __init__(self, census: RedisCensus, export: str) -> None:
        self._census = census
        self._export = export
        self._clock = SystemClock()
        self._reported_s = 0.0

    def __call__(self, state: ExportState, **fields: str) -> None:
        if not self._census.change(RecordKind.EXPORT, self._export, {"state": state, **fields}):
            raise _Withdrawn

    def progress(self, num_done: int, num_parts: int) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - self._reported_s >= _REPORT_EVERY_S:
            self._reported_s = now_s
            self(ExportState.RUNNING, progress=f"{num_done / num_parts:.3f}")


def _merged(settings: Settings, export: str, record: dict[str, str], *, report: _Report) -> Path:
    """The directory of the merged model, made unless an earlier start had made it."""
    output_dir = Path(settings.output_dir)
    out = output_dir / export_directory(export)
    if out.exists():
        return out
    # Only one process at a time works on an export: these were left by one that was killed.
    for draft in out.parent.glob(f".{out.name}.*.tmp"):
        shutil.rmtree(draft)
    checkpoint_dir = parse_uri(record["path"]).directory(output_dir)
    manifest = read_manifest(checkpoint_dir, source=record["path"])
    _check(manifest, record, settings)
    base_dir = model_directory(settings.model_path)
    budget = DiskBudget(output_dir, limit_bytes=settings.storage_limit)
    config_dir = Path(settings.config_path) if settings.config_path else base_dir
    family = Family(
        config_dir=config_dir,
        tokenizer_dir=Path(settings.tokenizer_path) if settings.tokenizer_path else config_dir,
    )
    budget.admit(merged_size_bytes(base_dir, family=family), what=f"the export of {record['path']}")
    return merge_checkpoint(checkpoint_dir, base_dir, out, family=family, progress=report.progress)


def _check(manifest: Manifest, record: dict[str, str], settings: Settings) -> None:
    if manifest.tenant != record["tenant"] or str(manifest.created_ms) != record["saved_ms"]:
        raise UnknownModel(f"checkpoint {record['path']} was deleted or replaced since the export was asked for")
    served = {settings.model_name, settings.model_path, *settings.model_aliases}
    if manifest.base_model not in served:
        own = settings.model_name or settings.model_path
        raise InvalidRequest(
            f"checkpoint {record['path']} is of the base model {manifest.base_model}, and this server has {own}"
        )
