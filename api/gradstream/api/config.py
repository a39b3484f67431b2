"""What the HTTP edge is configured with: its own small slice of the settings."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Limits and times of the API process. Sizes are bytes after decompression, times are seconds."""

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
    gap_check_s: float = 5.0
    card_ttl_s: float = 1.0
