"""Each setting of the API and of the queue's budgets reaches the part that acts on it."""

from pathlib import Path

import msgspec
import pytest

from gradstream.api.config import api_config
from gradstream.shared.config import Settings
from gradstream.shared.joblog.limits import limits_of

# Field, another value than the default, the attribute that it must reach, and what must be there.
API = [
    ("api_keys_file", "/keys.json", "keys_file", Path("/keys.json")),
    ("api_without_keys", True, "is_open", True),
    ("poll_hold_s", 3.0, "poll_hold_s", 3.0),
    ("admit_hold_s", 3.0, "admit_hold_s", 3.0),
    ("max_body_bytes", 9999, "max_body_bytes", 9999),
    ("max_json_body_bytes", 9999, "max_json_body_bytes", 9999),
    ("max_inflight_body_bytes", 9999, "max_inflight_body_bytes", 9999),
    ("max_datums", 3, "max_datums", 3),
    ("max_num_samples", 3, "max_num_samples", 3),
    ("max_samplers_per_tenant", 3, "max_samplers_per_tenant", 3),
    ("max_sessions_per_tenant", 3, "max_sessions_per_tenant", 3),
    ("max_model_records_per_tenant", 3, "max_model_records_per_tenant", 3),
    ("max_models_per_tenant", 3, "max_models_per_tenant", 3),
    ("max_stored_bytes_per_tenant", 9999, "max_stored_bytes_per_tenant", 9999),
    ("idle_session_timeout", 3.0, "idle_session_timeout_s", 3.0),
    ("output_dir", "/else", "output_dir", Path("/else")),
]
QUEUE = [
    ("max_queued_jobs_per_model", 3, "max_queued_jobs_per_model", 3),
    ("max_queued_jobs_per_sampler", 3, "max_queued_jobs_per_sampler", 3),
    ("max_queued_jobs_per_tenant", 3, "max_queued_jobs_per_tenant", 3),
    ("max_queued_bytes_per_tenant", 9999, "max_queued_bytes_per_tenant", 9999),
    ("max_queued_bytes", 9999, "max_queued_bytes", 9999),
    ("max_unread_bytes_per_tenant", 9999, "max_unread_bytes_per_tenant", 9999),
    ("hold_timeout_s", 3.0, "hold_timeout_s", 3.0),
    ("unread_result_ttl_s", 99, "unread_ttl_s", 99),
    ("delivered_result_ttl_s", 99, "delivered_ttl_s", 99),
    ("lease_ttl_s", 3.0, "lease_ttl_s", 3.0),
]

pytestmark = pytest.mark.config_field(
    "api_keys_file", "api_without_keys", "poll_hold_s", "admit_hold_s", "max_body_bytes", "max_json_body_bytes",
    "max_inflight_body_bytes", "max_datums", "max_num_samples", "max_samplers_per_tenant", "max_sessions_per_tenant",
    "max_model_records_per_tenant", "max_models_per_tenant", "max_stored_bytes_per_tenant", "max_queued_jobs_per_model",
    "max_queued_jobs_per_sampler", "max_queued_jobs_per_tenant", "max_queued_bytes_per_tenant", "max_queued_bytes",
    "max_unread_bytes_per_tenant", "hold_timeout_s", "unread_result_ttl_s", "delivered_result_ttl_s", "lease_ttl_s",
)  # fmt: skip


@pytest.mark.parametrize(("field", "value", "place", "expected"), API, ids=[row[0] for row in API])
def test_a_setting_of_the_api_reaches_it(field, value, place, expected):
    settings = Settings(model_path="m")

    assert getattr(api_config(settings), place) != expected
    assert getattr(api_config(msgspec.structs.replace(settings, **{field: value})), place) == expected


@pytest.mark.parametrize(("field", "value", "place", "expected"), QUEUE, ids=[row[0] for row in QUEUE])
def test_a_budget_of_the_queue_reaches_every_process_that_opens_it(field, value, place, expected):
    settings = Settings(model_path="m")

    assert getattr(limits_of(settings), place) != expected
    assert getattr(limits_of(msgspec.structs.replace(settings, **{field: value})), place) == expected
