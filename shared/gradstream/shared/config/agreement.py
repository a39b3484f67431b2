"""What processes of one engine that read their config apart from each other must have in common."""

from collections.abc import Mapping
from importlib.metadata import version

import msgspec

from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.settings import Settings
from gradstream.shared.config.support import EMBEDDED, ZMQ

# Values by field name, as plain data.
Terms = dict[str, object]

_VERSION = "version of gradstream"
# Of one process or of one machine: how it reaches the others, what it says, where it keeps the same files.
LOCAL = frozenset(
    {
        "model_path", "config_path", "tokenizer_path", "tokenizer_id", "torch_threads", "log_level", "redis_url",
        "worker_connection_timeout", "worker_max_retries", "restart_backoff_s", "max_restart_backoff_s", "stop_timeout_s",
        *EMBEDDED, *ZMQ,
    }
    | {name for name, field in FIELDS.items() if field.group == "API"}
)  # fmt: skip
# Derived from other fields in the same way everywhere.
_DERIVED = frozenset({"model_name", "output_dir", "num_ranks", "data_parallel_replicate_size"})

_ENCODER = msgspec.json.Encoder(order="sorted")


def terms_of_engine(settings: Settings) -> Terms:
    """What a server and its gang must agree on: fields as they were written, since their machines may differ.

    settings are resolved. The device is left to the gang.
    """
    return _terms({name: _as_written(settings, name) for name in FIELDS.keys() - LOCAL - {"device"}})


def terms_of_gang(settings: Settings) -> Terms:
    """What the ranks of a gang must agree on: every value in use that is not local. settings are resolved."""
    return _terms({name: getattr(settings, name) for name in FIELDS.keys() - LOCAL})


def encode_terms(terms: Terms) -> bytes:
    """JSON, the same for the same terms."""
    return _ENCODER.encode(terms)


def decode_terms(data: bytes) -> Terms:
    """What encode_terms wrote. Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=dict[str, object])


def disagreements(mine: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """Each field that differs, as `FIELD: mine here, theirs there`, in the order of the documentation."""
    order = [_VERSION, *FIELDS]
    names = [name for name in order if mine.get(name) != theirs.get(name)]
    return [f"{name}: {_shown(mine, name)} here, {_shown(theirs, name)} there" for name in names]


def _terms(values: Terms) -> Terms:
    plain = decode_terms(encode_terms(values))
    return {_VERSION: version("gradstream"), **plain}


def _as_written(settings: Settings, name: str) -> object:
    if name in settings.explicit or name in _DERIVED:
        return getattr(settings, name)
    return FIELDS[name].default


def _shown(terms: Mapping[str, object], name: str) -> str:
    if name not in terms:
        return "unknown"
    value = terms[name]
    return value if isinstance(value, str) and value else msgspec.json.encode(value).decode()
