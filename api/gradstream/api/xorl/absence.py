"""What a client hears whose model is not there."""

from gradstream.api.names import Target, shown
from gradstream.api.parts import Parts
from gradstream.api.xorl.models import unknown
from gradstream.shared.errors import UnknownModel
from gradstream.shared.joblog.port import RecordKind


async def missing(parts: Parts, target: Target) -> UnknownModel:
    """The error that a job finds no model; it tells where the state is of one that was unloaded."""
    record = await parts.intake.record(RecordKind.MODEL, target.model) or {}
    last = record.get("last_checkpoint")
    if record.get("tenant") != target.tenant or not last:
        return unknown(target)
    return UnknownModel(
        f"model_id: the model {target.name!r} is not in memory any more; its last checkpoint is {shown(last)}: create the model again "
        "and load that"
    )
