"""API keys: made, kept as hashes in one file, and matched to their tenants."""

from gradstream.shared.keys.api_key import KeyRing, NewKey, StoredKey, mint
from gradstream.shared.keys.key_file import KeyFileError, change_keys, read_keys
from gradstream.shared.keys.watch import WatchedKeys

__all__ = ["KeyFileError", "KeyRing", "NewKey", "StoredKey", "WatchedKeys", "change_keys", "mint", "read_keys"]
