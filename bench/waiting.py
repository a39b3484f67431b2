"""What spinning threads cost on a busy machine: the same matrix products with OMP_WAIT_POLICY active and passive, beside a load.

Run: python -m bench.waiting. Prints medians over rounds in turn, and the ratio.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import time

from gradstream.shared.config.machine import child_environment

_JOB = """
import time, torch
torch.set_num_threads({threads})
a, b = torch.randn(64, 576), torch.randn(576, 1536)
for _ in range(50): a @ b
wall, cpu = time.perf_counter(), time.process_time()
for _ in range(300): a @ b
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
_ROUNDS = 3


def _spin() -> None:
    while True:
        pass


def measure(policy: str, *, threads: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _JOB.format(threads=threads)],
        env=child_environment(OMP_WAIT_POLICY=policy, OMP_NUM_THREADS=str(threads)),
        check=True,
        capture_output=True,
        text=True,
    )
    wall, cpu = done.stdout.split()
    return float(wall), float(cpu)


def main() -> None:
    """Measure on an otherwise quiet machine and beside one busy process for each core."""
    cores = os.cpu_count() or 1
    for num_busy in (0, cores):
        load = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(num_busy)]
        for process in load:
            process.start()
        time.sleep(0.5)
        runs: dict[str, list[tuple[float, float]]] = {"active": [], "passive": []}
        for _ in range(_ROUNDS):
            for policy, values in runs.items():
                values.append(measure(policy, threads=cores))
        for process in load:
            process.terminate()
        wall = {policy: statistics.median(value[0] for value in values) for policy, values in runs.items()}
        cpu = {policy: statistics.median(value[1] for value in values) for policy, values in runs.items()}
        sys.stdout.write(
            f"{num_busy} busy processes beside {cores} threads: wall active {wall['active']:.2f} s, passive {wall['passive']:.2f} s "
            f"(ratio {wall['active'] / wall['passive']:.2f}); CPU active {cpu['active']:.2f} s, passive {cpu['passive']:.2f} s\n"
        )


if __name__ == "__main__":
    main()
