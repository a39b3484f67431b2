"""What cannot be said is dropped."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from gradstream.worker.voice import Heedless, console


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_does_not_end_the_speaker() -> None:
    # Opened without buffers: closing it has nothing left to write.
    with Path("/dev/full").open("wb", buffering=0) as raw:
        console = Console(file=Heedless(io.TextIOWrapper(raw, write_through=True)), soft_wrap=True)
        for _ in range(100):
            console.print("x" * 1000)


def test_a_reader_that_went_away_does_not_end_the_speaker() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as raw:
        Console(file=Heedless(io.TextIOWrapper(raw, write_through=True))).print("is anybody there?")


def test_what_can_be_said_is_said() -> None:
    heard = io.StringIO()
    Console(file=Heedless(heard), soft_wrap=True).print("ready")
    assert heard.getvalue() == "ready\n"


def test_ids_and_paths_come_out_as_they_are(capsys):
    console().print("a:train:0 [red]/x[/y]", markup=False)
    assert capsys.readouterr().out == "a:train:0 [red]/x[/y]\n"
