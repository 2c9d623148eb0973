"""What a training step of a well-known network costs: live bytes, resident memory, time."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import resource as system
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import batchnorm

from .machine import ROOT
from .networks import all_gradients
from .rows import Row, refusal
from .steps import _resident
from .timing import Phases, alternate

NETWORKS: dict[str, tuple[int, ...]] = {
    "mobilenet_v2": (16, 3, 96, 96),
    "densenet121": (8, 3, 96, 96),
    "resnet50": (8, 3, 96, 96),
    "efficientnet_b0": (8, 3, 96, 96),
    "shufflenet_v2_x1_0": (16, 3, 96, 96),
    "regnet_y_400mf": (8, 3, 96, 96),
}
"""Definitions of torchvision, and the input of a step."""

CONTESTANTS = ("torch", "accelerated", "saving")
"""torchvision's network; after `accelerate`; the same inside `recompute_outputs`."""

WITHOUT = "neither layers nor activations"
"""torchvision's network with identities in the place of batch normalization and activations: what these would give if
they took no time. It is no limit where convolutions or poolings are taken in."""

_LEFT_OUT = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)

ALONE = (
    "torch",
    "accelerated",
    "torch, memory reused",
    "accelerated, memory reused",
    "torch, memory reused, channels last",
    "accelerated, memory reused, channels last",
)
"""What a process that does nothing else runs: the layers, `reuse_memory`, and the order of convolutions' weights."""

APART = ("mobilenet_v2",)
"""The networks that are measured so; where convolutions are nearly all of a step, the machine's noise tells most."""

RESIDENT = ("mobilenet_v2", "densenet121")
"""The networks whose resident memory is measured, with a batch four times as large."""

SMALLER = (4, 3, 64, 64)
"""The input that gradients are compared on, in float64 too."""

SEEDS = 5
CLASSES = 1000
NO_TORCHVISION = "torchvision is not installed: pip install --no-deps torchvision"
_operators: list[Any] = []


def torchvision() -> Any:
    """The package, or None. Builds for another torch lack operators that its import asks for by name.

    Its own library comes first, since it ends the process where an operator is there already.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for library in Path(spec.origin).parent.glob("_C*.so"):
        with suppress(OSError):
            torch.ops.load_library(library)
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            made = torch.library.Library("torchvision", "FRAGMENT")
            made.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _operators.append(made)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchvision as package
    except ImportError:
        return None
    return package


class Step:
    """Forward, cross-entropy and backward of one network."""

    def __init__(
        self,
        network: str,
        contestant: str,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.net: nn.Module = torchvision().models.get_model(network, weights=None).train()
        shape = shape or NETWORKS[network]
        layers, *options = contestant.split(", ")
        self.saving = layers == "saving"
        last = "channels last" in options
        if layers == WITHOUT:
            for parent in list(self.net.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, _LEFT_OUT):
                        setattr(parent, name, nn.Identity())
        elif layers != "torch":
            batchnorm.accelerate(self.net, torch.randn(2, *shape[1:]), channels_last=last)
        elif last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(seed + 1)
        self.net.to(dtype)
        self.x = torch.randn(shape, generator=generator).to(dtype)
        self.target = torch.randint(CLASSES, shape[:1], generator=generator)

    def run(self) -> None:
        """One step; no optimizer, which is the same for all."""
        self.net.zero_grad(set_to_none=True)
        torch.manual_seed(2)  # of dropout
        saving: AbstractContextManager[Any] = batchnorm.recompute_outputs() if self.saving else nullcontext()
        with saving:
            loss = F.cross_entropy(self.net(self.x), self.target)
        loss.backward()

    def gradients(self) -> torch.Tensor:
        """Of all parameters, end to end."""
        for module in self.net.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.eval()  # draws other numbers in float64
        self.run()
        return all_gradients(self.net)


def error(network: str, contestant: str) -> float:
    """Distance of all gradients from the float64 network's (torch's own layers), over their length: the least of SEEDS.

    Behind many relus one network says little. An input that lies near a kink may fall on either side, in torch's layers
    as in ours. The distance is then a hundred times as large, which happens in about every other of these networks. A
    fault of the layers shows in all of them.
    """

    def of(seed: int) -> float:
        given = Step(network, contestant, SMALLER, seed=seed).gradients()
        true = Step(network, "torch", SMALLER, torch.float64, seed).gradients()
        return float((given - true).norm() / true.norm())

    return min(of(seed) for seed in range(SEEDS))


def live_bytes(run: Callable[[], None], net: nn.Module) -> int:
    """The most that torch has allocated at once in a step beyond what it had before, without parameters' gradients.

    The step must have run before, and gradients must be None.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak - sum(p.grad.numel() * p.grad.element_size() for p in net.parameters() if p.grad is not None)


def measure(network: str, seconds: float) -> Iterator[Row]:
    """Live bytes and time of the contestants that are not further from float64 than torch's layers (times 1.5)."""
    columns = {"suite": "networks", "network": network, "dtype": "float32", "shape": list(NETWORKS[network])}
    if torchvision() is None:
        yield {**columns, "contestant": "accelerated", "absent": NO_TORCHVISION}
        return
    errors = {name: error(network, name) for name in CONTESTANTS}
    steps, runs = {}, {}
    for name, off in errors.items():
        if reason := refusal(name, off, errors["torch"], torch.float32):
            yield {**columns, "contestant": name, "absent": reason}
            continue
        steps[name] = Step(network, name)
    steps[WITHOUT] = Step(network, WITHOUT)  # which computes something else, and is no contestant
    for name, step in steps.items():
        runs[name] = _timed(step)
        runs[name]()
    live = {}
    for name in runs:
        steps[name].net.zero_grad(set_to_none=True)
        live[name] = live_bytes(steps[name].run, steps[name].net)
    times, rounds = alternate(runs, seconds, least=3)
    for name in runs:
        yield {
            **columns, "direction": "forward+backward", "contestant": name, "rounds": rounds, "bytes": live[name],
            "of_torch": live[name] / live["torch"], "ms": times[name]["wall"] * 1e3,
            "x_torch": times["torch"]["wall"] / times[name]["wall"], "processor_ms": times[name]["processor"] * 1e3,
            "x_torch_processor": times["torch"]["processor"] / times[name]["processor"], "error": errors.get(name),
        }  # fmt: skip


def _timed(step: Step) -> Callable[[], Phases]:
    """On the clock, and by the time that processors worked for this process, which others' work disturbs less."""

    def run() -> Phases:
        begin, worked = time.perf_counter(), time.process_time()
        step.run()
        return {"wall": time.perf_counter() - begin, "processor": time.process_time() - worked}

    return run


def alone(network: str, seconds: float) -> Iterator[Row]:
    """Time and page faults of a step where each contestant has a process to itself, as users have it, twice in turn."""
    columns = {"suite": "alone", "network": network, "dtype": "float32", "shape": list(NETWORKS[network])}
    if torchvision() is None:
        yield {**columns, "contestant": "accelerated", "absent": NO_TORCHVISION}
        return
    found: dict[str, list[Any]] = {name: [] for name in ALONE}
    for name in (*ALONE, *reversed(ALONE)):
        code = f"from benchmarks.whole import alone_here; alone_here({network!r}, {name!r}, {seconds / 2})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        found[name] += json.loads(done.stdout)
    milliseconds = {name: statistics.median(ms for ms, _ in steps) for name, steps in found.items()}
    for name, steps in found.items():
        yield {
            **columns, "direction": "forward+backward", "contestant": name, "rounds": len(steps),
            "ms": milliseconds[name],
            "x_torch": milliseconds["torch"] / milliseconds[name], "faults": statistics.median(f for _, f in steps),
        }  # fmt: skip


def alone_here(network: str, contestant: str, seconds: float) -> None:
    """Prints milliseconds and page faults of each step."""
    if "memory reused" in contestant:
        batchnorm.reuse_memory()
    step, found = Step(network, contestant), []
    for _ in range(2):
        step.run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 3:
        begin, faults = time.perf_counter(), system.getrusage(system.RUSAGE_SELF).ru_minflt
        step.run()
        taken = (time.perf_counter() - begin) * 1e3
        found.append((taken, system.getrusage(system.RUSAGE_SELF).ru_minflt - faults))
    print(json.dumps(found))


def resident(network: str, allocator: str) -> Iterator[Row]:
    """By how much two steps raise the resident memory of a process of their own, with a batch four times as large."""
    shape = (4 * NETWORKS[network][0], *NETWORKS[network][1:])
    columns = {
        "suite": "networks",
        "network": network,
        "dtype": "float32",
        "shape": list(shape),
        "allocator": allocator,
    }
    if torchvision() is None or not Path("/proc/self/clear_refs").exists():
        yield {**columns, "contestant": "accelerated", "absent": "resident memory needs torchvision and Linux's /proc"}
        return
    peaks = {}
    for name in CONTESTANTS:
        code = f"from benchmarks.whole import resident_here; resident_here({network!r}, {name!r}, {shape!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[name] = int(json.loads(done.stdout))
    for name, peak in peaks.items():
        yield {
            **columns, "direction": "resident", "contestant": name, "bytes": peak, "of_torch": peak / peaks["torch"],
        }  # fmt: skip


def resident_here(network: str, contestant: str, shape: tuple[int, ...]) -> None:
    """Prints the peak; the process must not have done anything else."""
    step = Step(network, contestant, shape)
    Step(network, contestant, (2, *shape[1:])).run()  # loads what is loaded once
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _resident("VmRSS")
    for _ in range(2):
        step.run()
    print(_resident("VmHWM") - before)
