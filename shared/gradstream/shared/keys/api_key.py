"""One API key: its text, what is kept of it, and how a presented text is matched.

A key is `tml-{id}-{secret}`: the id (8 hex digits) names the key in lists and logs, the secret has 192 random bits. Of the secret only
a salted BLAKE2b digest is kept; with that many random bits a slow password hash would add nothing.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from gradstream.shared.ids import TenantId

_KEY = re.compile(r"tml-([0-9a-f]{8})-[0-9a-f]{48}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NUM_ID_BYTES = 4
_NUM_SECRET_BYTES = 24
_NUM_SALT_BYTES = 16
_NUM_DIGEST_BYTES = 32


class StoredKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of a key. salt and digest are hex; created_ms is wall time."""

    key_id: str
    tenant: TenantId
    salt: str
    digest: str
    created_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key that was just made. text exists nowhere else and is left out of repr."""

    text: str = field(repr=False)
    stored: StoredKey


def is_valid_tenant(text: str) -> bool:
    """True when text may name a tenant."""
    return _TENANT.fullmatch(text) is not None


def mint(tenant: TenantId, *, created_ms: int) -> NewKey:
    """A new random key of tenant; ValueError when tenant is no valid name."""
    if not is_valid_tenant(tenant):
        raise ValueError(
            f"tenant {tenant[:80]!r}: use 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first"
        )
    key_id = secrets.token_hex(_NUM_ID_BYTES)
    text = f"tml-{key_id}-{secrets.token_hex(_NUM_SECRET_BYTES)}"
    salt = secrets.token_hex(_NUM_SALT_BYTES)
    stored = StoredKey(key_id=key_id, tenant=tenant, salt=salt, digest=_digest(text, salt), created_ms=created_ms)
    return NewKey(text=text, stored=stored)


def looks_like_key(text: str) -> bool:
    """True when text has the form of a whole key, which belongs in no list, log or command line."""
    return _KEY.fullmatch(text) is not None


class KeyRing:
    """Keys to be matched against. An unknown id costs as much time as a wrong secret."""

    def __init__(self, keys: Iterable[StoredKey]) -> None:
        self._keys = {key.key_id: key for key in keys}
        self._nobody = mint(TenantId("nobody"), created_ms=0).stored

    def __len__(self) -> int:
        return len(self._keys)

    def tenant_of(self, text: str) -> TenantId | None:
        """The tenant that the key belongs to, or None for anything that is no key of this ring."""
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        stored = self._keys.get(match[1])
        expected = stored or self._nobody
        is_same = hmac.compare_digest(_digest(text, expected.salt), expected.digest)
        return stored.tenant if stored is not None and is_same else None


def _digest(text: str, salt: str) -> str:
    return hashlib.blake2b(text.encode(), key=salt.encode(), digest_size=_NUM_DIGEST_BYTES).hexdigest()
