"""End-to-end training steps, and the memory that one takes."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .machine import ROOT
from .networks import NETWORKS, NORMS, TrainingStep
from .rows import Row, compare, refusal
from .timing import Phases, alternate

SMALLER = {"resnet18": (4, 3, 64, 64), "mobilenet": (4, 3, 64, 64), "mlp": (64, 256)}
"""The inputs that gradients are compared on, in float64 too."""


def error(network: str, name: str, dtype: torch.dtype) -> float:
    """Distance of all gradients from the float64 network's (torch's own layers), over their length."""
    given, true = (
        TrainingStep(network, *which, SMALLER[network]).gradients()
        for which in ((name, dtype), ("torch", torch.float64))
    )
    return float((given - true).norm() / true.norm())


def measure(network: str, dtype: str, seconds: float) -> Iterator[Row]:
    """The rows of a network: of the contestants that are not further from float64 than torch's layers (times 1.5)."""
    columns = {
        "suite": "step", "network": network, "dtype": dtype, "shape": list(NETWORKS[network][1]),
        "order": "channels_last" if dtype == "bfloat16" and len(NETWORKS[network][1]) == 4 else "planar",
        "direction": "step",
    }  # fmt: skip
    kind = getattr(torch, dtype)
    errors = {name: error(network, name, kind) for name in NORMS}
    runs: dict[str, Callable[[], Phases]] = {}
    for name, off in errors.items():
        if reason := refusal(name, off, errors["torch"], kind):
            yield {**columns, "contestant": name, "absent": reason}
        else:
            runs[name] = _timed(TrainingStep(network, name, kind))
    times, rounds = alternate(runs, seconds, least=3)
    yield from compare({**columns, "rounds": rounds}, times, {name: errors[name] for name in runs})


def _timed(step: TrainingStep) -> Callable[[], Phases]:
    def run() -> Phases:
        begin = time.perf_counter()
        step.run()
        return {"step": time.perf_counter() - begin}

    return run


def peak(network: str, dtype: str, name: str) -> int:
    """Bytes by which one training step raises the resident memory, in a process of its own.

    What the operating system counts, and not what torch's allocator hands out, because scratch memory of the
    convolutions and the rounding up to huge pages are paid for, too.
    """
    code = f"from benchmarks.steps import peak_here; peak_here({network!r}, {dtype!r}, {name!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def peak_here(network: str, dtype: str, name: str) -> None:
    """Prints `peak`; the process must not have done anything else."""
    kind = getattr(torch, dtype)
    TrainingStep(network, name, kind, SMALLER[network]).run()  # loads what is loaded once
    step = TrainingStep(network, name, kind)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _resident("VmRSS")
    step.run()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(network: str, dtype: str) -> Iterator[Row]:
    """Peak memory of a training step, in bytes, for each contestant."""
    columns = {"suite": "memory", "network": network, "dtype": dtype, "shape": list(NETWORKS[network][1])}
    if not Path("/proc/self/clear_refs").exists():
        yield {**columns, "contestant": "ours", "absent": "peak memory is read from Linux's /proc"}
        return
    peaks = {name: peak(network, dtype, name) for name in NORMS}
    for name, value in peaks.items():
        yield {**columns, "direction": "step", "contestant": name, "bytes": value, "of_torch": value / peaks["torch"]}
