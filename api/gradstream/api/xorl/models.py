"""Models as xorl clients name them: the one that a request means, and its record."""

from collections.abc import Mapping

from gradstream.api.names import Target, target
from gradstream.api.parts import Parts
from gradstream.api.xorl.bodies import NamedBody
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.port import RecordKind


def target_of(body: NamedBody, *, tenant: TenantId) -> Target:
    """The model of a body; raises InvalidRequest for a name that is none."""
    return target(body.model_id, tenant=tenant)


async def record_of(parts: Parts, target: Target) -> Mapping[str, str]:
    """The record of a model; raises UnknownModel when there is none."""
    record = await parts.intake.record(RecordKind.MODEL, target.model)
    if record is None or record.get("tenant") != target.tenant:
        raise unknown(target)
    return record


def unknown(target: Target) -> UnknownModel:
    """The error that says that there is no such model."""
    return UnknownModel(f"model_id: there is no model {target.name!r}; create it with create_model")
