"""The API's Prometheus metrics, declared once."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of one API process, in a registry of their own. Labels are bounded: routes, methods, ops, codes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gradstream_api_requests_total",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "gradstream_api_request_seconds",
            "Time from the request's first byte to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.body_bytes = Counter(
            "gradstream_api_request_body_bytes_total",
            "Bytes of request bodies, as they came over the wire.",
            registry=self.registry,
        )
        self.jobs = Counter(
            "gradstream_api_submissions_total",
            "Submissions by op and by answer: accepted, duplicate, or the code of the error.",
            ("op", "answer"),
            registry=self.registry,
        )
        self.polls_parked = Gauge(
            "gradstream_api_polls_parked",
            "Long polls that wait for a result now.",
            registry=self.registry,
        )
        self.gaps_failed = Counter(
            "gradstream_api_gap_jobs_failed_total",
            "Held jobs failed because a seq_id before them never came.",
            registry=self.registry,
        )
        self.auth_failures = Counter(
            "gradstream_api_auth_failures_total",
            "Requests turned away at the gate: no_key, wrong_key, or limited after too many of them.",
            ("reason",),
            registry=self.registry,
        )
        self.telemetry_events = Counter(
            "gradstream_api_telemetry_events_total",
            "Telemetry events that clients sent; they are counted and dropped.",
            registry=self.registry,
        )
