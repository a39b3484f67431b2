"""Names of the xorl dialect: what its clients call their models, and how they are shown checkpoints."""

import re
from dataclasses import dataclass

from gradstream.api.dialect import is_name
from gradstream.shared import ids
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import DEFAULT_MODEL, ModelId, TenantId, name_of

SCHEME = "xorl://"
_STORED_PATH = re.compile(r"tinker://([^/\s'\"]+)/([^/\s'\"]+)/([^/\s'\"]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The model that a request means. name: what the client calls it; model: its id in the job log, the records and on disk."""

    name: str
    model: ModelId
    tenant: TenantId

    @property
    def is_default(self) -> bool:
        return self.name == DEFAULT_MODEL


def target(name: str, *, tenant: TenantId, field: str = "model_id") -> Target:
    """The model of this name; raises InvalidRequest for a text that is no name.

    The id is the name itself for the machine's own tenant, and TENANT:NAME for others: a colon is in no name, and ids of the tinker
    dialect have two.
    """
    if not is_name(name):
        raise InvalidRequest(
            f"{field}: {name[:140]!r} cannot name a model; use 1 to 128 letters, digits, '_' and '-', starting with a letter or digit"
        )
    model = ids.named_model(name, tenant=tenant)
    if not ids.is_valid_id(model):
        raise InvalidRequest(
            f"{field}: the tenant {tenant!r} cannot have models of its own choice of name, as its name has '..' in it"
        )
    return Target(name=name, model=ModelId(model), tenant=tenant)


def has_name(model: str) -> bool:
    """True for the id of a model that a xorl client named; ids of the tinker dialect have two colons."""
    return model.count(":") <= 1


def shown(text: str) -> str:
    """The text with every stored URI in it written as xorl clients write it."""
    return _STORED_PATH.sub(lambda found: f"{SCHEME}{_called(found[1])}/{found[2]}/{found[3]}", text)


def _called(run: str) -> str:
    """The name of a model that has one; other ids are left as they are."""
    return name_of(run) if has_name(run) else run
