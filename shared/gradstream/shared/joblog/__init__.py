"""The durable queue: log, futures, journal and lease, on Redis."""
