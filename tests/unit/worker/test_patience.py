"""Waiting for room on the disk."""

import errno

import pytest

from gradstream.engine.files import storage_errors
from gradstream.shared.errors import StorageFailure
from gradstream.worker import patience
from gradstream.worker.patience import when_there_is_room


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(patience, "ROOM_RETRY_S", 0.0)


class Disk:
    """Refuses so many times."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)

    def write(self) -> str:
        with storage_errors("cannot write"):
            if self.errors:
                code = self.errors.pop(0)
                raise OSError(code, "refused")
        return "written"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_waited_out(code):
    disk = Disk(code, code)
    assert when_there_is_room(disk.write, is_over=lambda: False) == "written"
    assert disk.errors == []


def test_what_waiting_does_not_mend_is_raised():
    with pytest.raises(StorageFailure, match="permission denied"):
        when_there_is_room(Disk(errno.EACCES).write, is_over=lambda: False)


def test_a_stop_ends_the_wait():
    disk = Disk(*[errno.ENOSPC] * 5)
    assert when_there_is_room(disk.write, is_over=lambda: len(disk.errors) < 4) is None
    assert len(disk.errors) == 3
