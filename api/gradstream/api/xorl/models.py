"""Models as xorl clients name them, and as everything inside does."""

from collections.abc import Mapping
from dataclasses import dataclass

from gradstream.api.dialect import is_name
from gradstream.api.parts import Parts
from gradstream.api.xorl.bodies import NamedBody
from gradstream.shared import ids
from gradstream.shared.errors import InvalidRequest, UnknownModel
from gradstream.shared.ids import DEFAULT_MODEL, LOCAL_TENANT, ModelId, TenantId
from gradstream.shared.joblog.port import RecordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The model that a request means. name: what the client calls it; model: its id in the job log, the records and on disk."""

    name: str
    model: ModelId
    tenant: TenantId

    @property
    def is_default(self) -> bool:
        return self.name == DEFAULT_MODEL


def target_of(body: NamedBody, *, tenant: TenantId) -> Target:
    """The model of a body; raises InvalidRequest for a name that is none."""
    return target(body.model_id, tenant=tenant)


def target(name: str, *, tenant: TenantId, field: str = "model_id") -> Target:
    """The model of this name; raises InvalidRequest for a text that is no name.

    The id is the name itself for the machine's own tenant, and TENANT:NAME for others: a colon is in no name, and ids of the tinker
    dialect have two.
    """
    if not is_name(name):
        raise InvalidRequest(
            f"{field}: {name[:140]!r} cannot name a model; use 1 to 128 letters, digits, '_' and '-', starting with a letter or digit"
        )
    model = name if tenant == LOCAL_TENANT else f"{tenant}:{name}"
    if not ids.is_valid_id(model):
        raise InvalidRequest(
            f"{field}: the tenant {tenant!r} cannot have models of its own choice of name, as its name has '..' in it"
        )
    return Target(name=name, model=ModelId(model), tenant=tenant)


def name_of(model: str) -> str:
    """What its owner calls the model with this id."""
    return model.rpartition(":")[2]


async def record_of(parts: Parts, target: Target) -> Mapping[str, str]:
    """The record of a model; raises UnknownModel when there is none."""
    record = await parts.intake.record(RecordKind.MODEL, target.model)
    if record is None or record.get("tenant") != target.tenant:
        raise unknown(target)
    return record


def is_over(record: Mapping[str, str]) -> bool:
    """True when everything that the model has accepted ends with its unload, whether or not that was executed yet."""
    tail = record.get("tail")
    return tail == "gone" or (not tail and record.get("state") == "unloaded")


def unknown(target: Target) -> UnknownModel:
    """The error that says that there is no such model."""
    return UnknownModel(f"model_id: there is no model {target.name!r}; create it with create_model")
