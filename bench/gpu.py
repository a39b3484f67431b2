"""Tokens a second and the share of the machine's arithmetic (MFU) of LoRA and full training, of Qwen3-shaped models on one GPU.

Run it with `make bench-gpu`, or on a machine without this project's packages, from the repository's root, as
`PYTHONPATH=build/gpu-packages:engine:shared:. python3 -m bench.gpu` after `make gpu-packages` elsewhere (docs/performance.md).
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from bench import bare_machine
from bench.gpu_model import SHAPES, RandomModelEngine, Work
from bench.limits import TrainingCost, matmul_flops_per_s

# Dense bfloat16 products, from the makers' data sheets; by the beginning of the device's name.
_PEAK_TFLOPS = {"NVIDIA H200": 989.0, "NVIDIA H100": 989.0, "NVIDIA A100": 312.0, "NVIDIA L40S": 362.0}
_WARM_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One model and way of training. mfu: of the data sheet's limit, None for a device that is not known here; share_of_matmul: of what
    one large product reaches on this machine. error: why there are no figures.
    """

    shape: str
    mode: str
    tokens_per_s: float = 0.0
    step_ms: float = 0.0
    mfu: float | None = None
    share_of_matmul: float = 0.0
    peak_gib: float = 0.0
    error: str | None = None


def matmul_tflops(device: str) -> float:
    """What one large product reaches: bfloat16 on a GPU, float32 elsewhere."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return matmul_flops_per_s(torch.device(device), dtype, clock=time.perf_counter) / 1e12


def measure(name: str, mode: str, work: Work, *, device: str, limit_tflops: float) -> Figure:
    """Median step of one model; a model that does not fit is a figure with an error."""
    is_lora = mode == "lora"
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
            times = _steps(name, is_lora, work, device=device, folder=Path(folder))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        return Figure(shape=name, mode=mode, error=str(error).splitlines()[0])
    finally:
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    step_s = statistics.median(times)
    tokens_per_s = work.num_sequences * work.context / step_s
    flops = TrainingCost.of(SHAPES[name].config()).flops([work.context] * work.num_sequences, is_lora=is_lora)
    tflops = flops / step_s / 1e12
    peak = _peak_tflops(device)
    return Figure(
        shape=name,
        mode=mode,
        tokens_per_s=round(tokens_per_s, 1),
        step_ms=round(step_s * 1000, 3),
        mfu=None if peak is None else round(tflops / peak, 4),
        share_of_matmul=round(tflops / limit_tflops, 4),
        peak_gib=0.0 if device == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 2),
    )


def _steps(name: str, is_lora: bool, work: Work, *, device: str, folder: Path) -> list[float]:
    """Wall times in s."""
    engine = RandomModelEngine(SHAPES[name], device=device, is_lora=is_lora, rank=work.rank, folder=folder)
    times = []
    for turn in range(_WARM_UP + work.steps):
        started = time.perf_counter()
        engine.step(num_sequences=work.num_sequences, context=work.context)
        if turn >= _WARM_UP:
            times.append(time.perf_counter() - started)
    return times


def _peak_tflops(device: str) -> float | None:
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops for start, tflops in _PEAK_TFLOPS.items() if name.startswith(start)), None)


def _line(figure: Figure) -> str:
    head = f"{figure.shape:>5} {figure.mode:<4}"
    if figure.error is not None:
        return f"{head} no figures: {figure.error}"
    mfu = "   -" if figure.mfu is None else f"{figure.mfu:.1%}"
    return (
        f"{head} {figure.tokens_per_s:>10.0f} tokens/s, {figure.step_ms:>8.1f} ms a step, MFU {mfu}, "
        f"{figure.share_of_matmul:.1%} of a large product's rate, peak {figure.peak_gib:.1f} GiB"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the bench out")
    parser.add_argument("--shape", nargs="+", default=["0.6B", "1.7B", "8B"], choices=list(SHAPES))
    parser.add_argument("--mode", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--sequences", type=int, default=16, help="sequences of a step")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after two to warm up")
    parser.add_argument("--server", action="store_true", help="measure the server over the bare engine too")
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("bench.gpu needs an NVIDIA GPU; --device cpu --shape tiny tries the bench out without one")
    work = Work(num_sequences=options.sequences, context=options.context, rank=options.rank, steps=options.steps)
    limit_tflops = matmul_tflops(options.device)
    name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    _say(f"{name}, {versions}; a large product: {limit_tflops:.2f} TFLOP/s")
    _say(f"{work.num_sequences} sequences of {work.context} tokens a step, LoRA rank {work.rank}")
    figures = []
    for shape in options.shape:
        for mode in options.mode:
            figures.append(measure(shape, mode, work, device=options.device, limit_tflops=limit_tflops))
            _say(_line(figures[-1]))
    tax = _server_tax(options.shape[0], work, device=options.device) if options.server else None
    if options.json:
        found = {"device": name, "versions": versions, "matmul_tflops": limit_tflops, "server_tax": tax}
        options.json.write_text(
            json.dumps({**found, "figures": [asdict(figure) for figure in figures]}, indent=2) + "\n"
        )


def _server_tax(shape: str, work: Work, *, device: str) -> float | None:
    """By how much a step takes longer through the server; None, with a line that says why, where it cannot run."""
    if missing := bare_machine.absent(bare_machine.SERVER_PACKAGES):
        _say(f"the server's tax was not measured: {', '.join(missing)} not installed here")
        return None
    from bench.gpu_server import server_step_s  # noqa: PLC0415 (imports what may not be there)

    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        bare_s = statistics.median(_steps(shape, True, work, device=device, folder=Path(folder)))
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
        served_s = server_step_s(SHAPES[shape], work, device=device, folder=Path(folder))
    tax = served_s / bare_s - 1
    _say(
        f"{shape} lora through the server: {served_s * 1000:.1f} ms a step, {tax:+.1%} over the bare engine's {bare_s * 1000:.1f}"
    )
    return tax


if __name__ == "__main__":
    main()
