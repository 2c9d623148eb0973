"""Batch normalization on a GPU, side by side with a copy, eager torch and torch.compile.

    python -m benchmarks --suite gpu [--quick] [--out rows.jsonl]

A figure is kept only after the result agreed with the float64 formula. Every contestant sees the same tensors, in
turn, and figures are medians of milliseconds a call: in a CUDA graph over buffers that together exceed the L2 cache
several times (cold) and over one buffer (warm), both between events on the device; launched one by one over the rotated
buffers, between events (launched); and by the clock of the host, forward and backward with gradients (wall). Then
training steps of ResNet-50. The ratio to a copy of the same tensor is the result; times are notes. Rows name the
device, and the kernels that ran.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm
from batchnorm.kernels import aten
from batchnorm.ops import cuda

from .machine import environment as machine
from .rows import Row, compare, read
from .tables import gpu_summary
from .targets import judge

RESULTS = Path(__file__).parent / "results" / "gpu"
SHAPES = (
    (32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7), (8192, 1024), (256, 256), (64, 32),
)  # fmt: skip
FUSIONS = ("bn", "bn+relu", "bn+add+relu")
STEP = ((128, 3, 224, 224), 1000)  # of ResNet-50: the shape of a batch, and the classes
Function = Callable[..., Tensor]
Call = Callable[[], Any]


class Device:
    """What is asked of a CUDA device; tests stand another in its place."""

    name = "cuda"

    def cache(self) -> int:
        """Bytes of the L2."""
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, run: Call) -> float:
        """Of what `run` enqueues, between two events."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def graph(self, make: Callable[[], list[Call]], warm: bool) -> tuple[Call, int]:
        """Replays all calls (warm: the first as often), captured once; and how many they are."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls = make()
            calls = calls[:1] * len(calls) if warm else calls
            for _ in range(3):
                calls[0]()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            for call in calls:
                call()
        return captured.replay, len(calls)

    def kernels(self, run: Call) -> list[str]:
        """Names of the kernels that ran, for instance cuDNN's or ATen's own."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        return sorted({event.key.split("<")[0] for event in profile.key_averages()})

    def forget(self) -> None:
        """Frees what is cached, and counts the peak of memory anew."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated()

    def columns(self) -> Row:
        """What every row is true for."""
        import triton

        device = torch.device("cuda", torch.cuda.current_device())
        return {
            **machine(), "device": torch.cuda.get_device_name(), "implementation": cuda.describe(device),
            "triton": triton.__version__,
        }  # fmt: skip


class Case:
    """One shape, dtype, memory format and fusion: rotated inputs, the contenders, and the truth."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: torch.dtype, last: bool, fusion: str) -> None:
        order = "dense" if len(shape) == 2 else "channels_last" if last else "planar"
        self.columns = {
            "suite": "gpu", "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "order": order,
            "fusion": fusion,
        }  # fmt: skip
        self.device, self.fusion = device, fusion
        bytes_each = 4 * torch.empty(shape, dtype=dtype, device="meta").nbytes
        self.rotations = min(max(-(-4 * device.cache() // bytes_each), 2), 64)
        memory = torch.channels_last if last else torch.contiguous_format

        def draw() -> Tensor:
            return torch.randn(shape, device=device.name).to(dtype).to(memory_format=memory)

        self.inputs = [(draw().requires_grad_(), draw().requires_grad_(), draw()) for _ in range(self.rotations)]
        self.weight = (torch.randn(shape[1], device=device.name) + 1).requires_grad_()
        self.bias = torch.randn(shape[1], device=device.name).requires_grad_()

    def contestants(self) -> dict[str, Function]:
        eager = self._eager()
        fused = self.fusion != "bn"
        found = {"torch": eager, "compile": torch.compile(eager, fullgraph=True)}
        found["ours"] = self._ours(fused=False)
        if fused:
            found["ours fused"] = self._ours(fused=True)
        return found

    def _eager(self) -> Function:
        weight, bias, fusion = self.weight, self.bias, self.fusion

        def call(x: Tensor, residual: Tensor) -> Tensor:
            y = F.batch_norm(x, None, None, weight, bias, True)
            y = y + residual if "add" in fusion else y
            return torch.relu(y) if "relu" in fusion else y

        return call

    def _ours(self, fused: bool) -> Function:
        weight, bias, fusion = self.weight, self.bias, self.fusion

        def apart(x: Tensor, residual: Tensor) -> Tensor:
            y = batchnorm.functional.batch_norm(x, None, None, weight, bias, True)
            y = y + residual if "add" in fusion else y
            return torch.relu(y) if "relu" in fusion else y

        def together(x: Tensor, residual: Tensor) -> Tensor:
            other = residual if "add" in fusion else None
            return batchnorm.functional.batch_norm(
                x, None, None, weight, bias, True, activation="relu", residual=other
            )  # fmt: skip

        return together if fused else apart

    def error(self, function: Function) -> float:
        """The largest error of y and dx, in units in the last place; dx not where relu's kink is near."""
        x, residual, dy = self.inputs[0]
        y = function(x, residual)
        (dx,) = torch.autograd.grad(y, x, dy)
        added = residual.double() if "add" in self.fusion else None
        args = (x.double(), self.weight.double(), self.bias.double(), added, 0, 1e-5)
        activation = "relu" if "relu" in self.fusion else "identity"
        z, mean, var = aten.forward(*args, "identity", 0.0)
        true_y = aten.activate(z, activation, 0.0)
        true_dx = aten.gradients(dy.double(), *args[:4], mean, var, 0, 1e-5, activation, 0.0, False)[0]
        unit = torch.finfo(x.dtype).eps
        off_y = (y - true_y).abs() / (unit * (1 + true_y.abs()))
        off_dx = (dx - true_dx).abs() / (unit * (1 + true_dx.abs()))
        if activation == "relu":
            off_dx = torch.where(z.abs() < 8 * unit * (1 + z.abs()), 0.0, off_dx)
        return float(torch.maximum(off_y.max(), off_dx.max()).detach())

    def forward(self, function: Function) -> list[Callable[[], Any]]:
        def call(x: Tensor, residual: Tensor) -> Tensor:
            with torch.no_grad():
                return function(x, residual)

        return [lambda x=x, r=r: call(x, r) for x, r, _ in self.inputs]

    def backward(self, function: Function) -> list[Callable[[], Any]]:
        """Of forwards made here, on the current stream."""
        wanted = (self.weight, self.bias)

        def graph_of(x: Tensor, residual: Tensor, dy: Tensor) -> Callable[[], Any]:
            y = function(x, residual)
            inputs = (x, residual, *wanted) if "add" in self.fusion else (x, *wanted)
            return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

        return [graph_of(*each) for each in self.inputs]

    def copy(self) -> list[Callable[[], Any]]:
        targets = [torch.empty_like(x) for x, _, _ in self.inputs]
        return [lambda t=t, x=x: t.copy_(x.detach()) for t, (x, _, _) in zip(targets, self.inputs, strict=True)]


def medians(device: Device, runs: dict[str, tuple[Call, int]], rounds: int) -> dict[str, float]:
    """Seconds a call on the device: the contestants in turn, `rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, calls) in runs.items():
            times[name].append(device.seconds(run) / calls)
    return {name: statistics.median(each) for name, each in times.items()}


def wall(case: Case, contestants: dict[str, Function], rounds: int, repeats: int = 20) -> dict[str, float]:
    """Seconds of a forward and backward call from Python, launches not waited for one by one."""
    x, residual, dy = case.inputs[0]
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            case.device.synchronize()
            begin = time.perf_counter()
            for _ in range(repeats):
                torch.autograd.grad(function(x, residual), (x, case.weight, case.bias), dy)
            case.device.synchronize()
            times[name].append((time.perf_counter() - begin) / repeats)
    return {name: statistics.median(each) for name, each in times.items()}


def _launched(make: Callable[[], list[Call]]) -> tuple[Call, int]:
    calls = make()
    return (lambda: [call() for call in calls] and None), len(calls)


def measure(case: Case, rounds: int) -> Iterator[Row]:
    """Rows of every contestant whose result is right."""
    contestants = case.contestants()
    errors = {name: case.error(function) for name, function in contestants.items()}
    for name in [name for name, error in errors.items() if not error <= 16]:
        why = f"{case.columns['shape']}: off by {errors[name]:.0f} units in the last place: no figure"
        yield {**case.columns, "contestant": name, "absent": why}
        del contestants[name], errors[name]
    x, residual, dy = case.inputs[0]
    ran = {
        name: case.device.kernels(lambda f=function: torch.autograd.grad(f(x, residual), x, dy))  # type: ignore[misc]
        for name, function in contestants.items()
    }
    for figure in ("cold", "warm", "launched"):
        times: dict[str, dict[str, float]] = {name: {} for name in ("copy", *contestants)}
        for direction in ("forward", "backward"):
            makes = {"copy": case.copy} | {
                name: (lambda f=function: getattr(case, direction)(f))  # noqa: B023
                for name, function in contestants.items()
            }
            runs = {
                name: _launched(make) if figure == "launched" else case.device.graph(make, figure == "warm")
                for name, make in makes.items()
            }
            for name, seconds in medians(case.device, runs, rounds).items():
                times[name][direction] = seconds
        yield from _with_kernels(compare({**case.columns, "figure": figure}, times, errors, "copy"), ran)
    both = {name: {"forward+backward": each} for name, each in wall(case, contestants, max(rounds // 3, 3)).items()}
    yield from _with_kernels(compare({**case.columns, "figure": "wall"}, both, errors), ran)


def _with_kernels(rows: Iterable[Row], ran: dict[str, list[str]]) -> Iterator[Row]:
    for row in rows:
        yield {**row, "kernels": ran.get(row["contestant"], [])}


def training_steps(device: Device, rounds: int, network: Callable[[], torch.nn.Module] | None = None) -> Iterator[Row]:
    """ResNet-50 under AMP bf16, channels_last: torch's layers and ours, eager and compiled; time and peak memory."""
    if network is None:
        import torchvision

        network = torchvision.models.resnet50
    shape, classes = STEP
    columns = {
        "suite": "gpu step", "network": "ResNet-50", "shape": list(shape), "dtype": "bfloat16",
        "order": "channels_last", "direction": "step",
    }  # fmt: skip
    base: Row = {}
    for name in ("torch", "ours fused", "compile", "ours fused, compiled"):
        torch.manual_seed(0)
        device.forget()
        x = torch.randn(shape, device=device.name).to(memory_format=torch.channels_last)
        target = torch.randint(classes, (shape[0],), device=device.name)
        net = network().to(device.name).to(memory_format=torch.channels_last)
        if name.startswith("ours"):
            net = batchnorm.accelerate(net, x[:2])
        times = _step_times(device, torch.compile(net) if "compile" in name else net, x, target, rounds)
        row = {"contestant": name, "ms": statistics.median(times) * 1e3, "bytes": device.peak()}
        base = base or row
        if name != "torch":
            row |= {"x_torch": base["ms"] / row["ms"], "of_torch": row["bytes"] / max(base["bytes"], 1)}
        yield {**columns, **row, "targets": judge({**columns, **row})}
        del net, x, target


def _step_times(device: Device, net: Any, x: Tensor, target: Tensor, rounds: int) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    times = []
    for _ in range(5 + rounds):
        device.synchronize()
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.name, torch.bfloat16):
            loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        device.synchronize()
        times.append(time.perf_counter() - begin)
    return times[5:]


def cases(quick: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, bool, str]]:
    """Shape, dtype, whether channels last, fusion."""
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32, torch.float16):
        for shape in SHAPES[:2] if quick else SHAPES:
            for last in (False, True) if len(shape) == 4 else (False,):
                for fusion in FUSIONS:
                    yield shape, dtype, last, fusion


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """All there is to measure; a case that fails must not cost the others."""
    rounds = 15 if quick else 51
    for each in cases(quick):
        try:
            yield from measure(Case(device, *each), rounds)
        except Exception as error:
            yield {"suite": "gpu", "contestant": str(each), "absent": f"failed: {type(error).__name__}: {error}"}
        device.forget()
    try:
        yield from training_steps(device, rounds)
    except Exception as error:
        yield {"suite": "gpu step", "contestant": "ResNet-50", "absent": f"failed: {type(error).__name__}: {error}"}


def run(quick: bool, path: Path | None = None, device: Device | None = None) -> int:
    """Measures, writes rows as they come, prints tables; returns 0, 1 where something failed, 2 without a device."""
    if device is None:
        if not torch.cuda.is_available():
            print("benchmarks: no CUDA device here, so there is nothing to measure", file=sys.stderr)
            return 2
        device = Device()
    columns = {**device.columns(), "quick": quick}
    chip = re.sub(r"\W+", "-", columns["device"]).strip("-").lower()
    path = path or RESULTS / f"{datetime.date.today().isoformat()}-{chip}{'-quick' if quick else ''}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for row in rows(device, quick):
            out.write(json.dumps({**columns, **row}) + "\n")
            out.flush()
    found = read([path])
    print(gpu_summary(found))
    print(f"{len(found)} rows in {path}")
    absent = [row for row in found if "absent" in row]
    for row in absent:
        print(f"benchmarks: {row['contestant']}: {row['absent']}", file=sys.stderr)
    return int(bool(absent))
