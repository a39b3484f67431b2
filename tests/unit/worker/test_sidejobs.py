"""The works of one housekeeping task."""

from typing import cast

import pytest

from gradstream.worker.sidejobs import each
from gradstream.worker.sweeps import Parts

PARTS = cast("Parts", None)


async def test_a_work_that_fails_is_told_of_after_the_others_had_their_turn() -> None:
    done = []

    async def fails(_: Parts) -> int:
        raise OSError("the disk is away")

    async def works(_: Parts) -> int:
        done.append("works")
        return 2

    with pytest.raises(ExceptionGroup) as raised:
        await each(PARTS, [fails, works, fails])
    assert done == ["works"]
    assert [str(error) for error in raised.value.exceptions] == ["the disk is away"] * 2
    assert await each(PARTS, [works, works]) == 4
