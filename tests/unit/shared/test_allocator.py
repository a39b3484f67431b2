"""Freed blocks of megabytes are used again without a visit to the kernel."""

import platform
import subprocess
import sys

import pytest

# Three blocks of 60 MB in all, made and dropped in turn; prints the page faults of five rounds after two to warm up.
ROUNDS = """
import resource, sys
from gradstream.shared.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def round_():
    blocks = [bytearray(b"x") * (size << 20) for size in (24, 24, 12)]
    del blocks
round_(), round_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    round_()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", ROUNDS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_that_was_freed_is_not_mapped_anew():
    assert num_faults("kept") < num_faults("default") / 10
