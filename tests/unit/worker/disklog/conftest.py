"""A disk that is quick, for tests that lose no power."""

import os

import pytest

from gradstream.worker.disklog import segments, writer


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs take no time. A killed process loses nothing by that."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(segments, "sync_data", lambda _: None)
    monkeypatch.setattr(writer, "sync_data", lambda _: None)
