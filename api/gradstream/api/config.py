"""What the HTTP edge is configured with: its own small slice of the settings."""

from dataclasses import dataclass
from pathlib import Path

from gradstream.shared.config import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Limits and times of the API process. Sizes are bytes after decompression, times are seconds."""

    # None: there are no keys. is_open then drops the check that a request comes from this machine's own programs.
    keys_file: Path | None = None
    is_open: bool = False
    # Long polls end after poll_hold_s plus up to poll_jitter_s; the SDK's own read timeout is 45 s.
    poll_hold_s: float = 25.0
    poll_jitter_s: float = 3.0
    # A submission that finds the queue full waits this long for room before it is answered with 429.
    admit_hold_s: float = 20.0
    max_body_bytes: int = 64 * 1024 * 1024
    max_json_body_bytes: int = 32 * 1024 * 1024
    # Bodies of all requests in flight together.
    max_inflight_body_bytes: int = 512 * 1024 * 1024
    # A result above this size is announced before it is sent, when the client allows it.
    inline_result_bytes: int = 1024 * 1024
    max_datums: int = 4096
    max_num_samples: int = 1024
    max_topk: int = 64
    max_samplers_per_tenant: int = 100_000
    max_sessions_per_tenant: int = 10_000
    max_model_records_per_tenant: int = 10_000
    max_models_per_tenant: int = 256
    idle_session_timeout_s: float = 7200.0
    # None: only the server's storage_limit counts.
    max_stored_bytes_per_tenant: int | None = None
    # Where the worker saves checkpoints, to serve downloads from; None: this process cannot see it.
    output_dir: Path | None = None
    skip_initial_checkpoint: bool = True
    gap_check_s: float = 5.0
    card_ttl_s: float = 1.0


def api_config(settings: Settings) -> ApiConfig:
    """The API's slice of the settings."""
    return ApiConfig(
        keys_file=None if settings.api_keys_file is None else Path(settings.api_keys_file),
        is_open=settings.api_without_keys,
        poll_hold_s=settings.poll_hold_s,
        admit_hold_s=settings.admit_hold_s,
        max_body_bytes=settings.max_body_bytes,
        max_json_body_bytes=settings.max_json_body_bytes,
        max_inflight_body_bytes=settings.max_inflight_body_bytes,
        max_datums=settings.max_datums,
        max_num_samples=settings.max_num_samples,
        output_dir=Path(settings.output_dir),
        skip_initial_checkpoint=settings.skip_initial_checkpoint,
        max_samplers_per_tenant=settings.max_samplers_per_tenant,
        max_sessions_per_tenant=settings.max_sessions_per_tenant,
        max_model_records_per_tenant=settings.max_model_records_per_tenant,
        max_models_per_tenant=settings.max_models_per_tenant,
        idle_session_timeout_s=settings.idle_session_timeout,
        max_stored_bytes_per_tenant=settings.max_stored_bytes_per_tenant,
    )
