"""Batch normalization on a GPU, side by side with a copy, eager torch and torch.compile.

    python -m benchmarks.gpu [--quick] [--step] [--out rows.json]

A row is printed only after its result agreed with the float64 formula. Every contender sees the same tensors, in
turn, and the figures are medians: milliseconds a call in a CUDA graph over buffers that together exceed the L2 cache
several times (cold) and over one buffer (warm), and the wall time of a call with gradients as a user makes it. The
ratio to a copy of the same tensor is the result; times are notes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import batchnorm
from batchnorm.kernels import aten
from batchnorm.ops import cuda

SHAPES = (
    (32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7), (8192, 1024), (256, 256), (64, 32),
)  # fmt: skip
FUSIONS = ("bn", "bn+relu", "bn+add+relu")
Function = Callable[..., Tensor]


class Case:
    """One shape, dtype, memory format and fusion: rotated inputs, the contenders, and the truth."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, last: bool, fusion: str) -> None:
        self.key = {
            "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "channels_last": last, "fusion": fusion,
        }  # fmt: skip
        self.fusion = fusion
        bytes_each = 4 * torch.empty(shape, dtype=dtype, device="meta").nbytes
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.rotations = min(max(-(-4 * cache // bytes_each), 2), 64)
        memory = torch.channels_last if last else torch.contiguous_format

        def draw() -> Tensor:
            return torch.randn(shape, device="cuda").to(dtype).to(memory_format=memory)

        self.inputs = [(draw().requires_grad_(), draw().requires_grad_(), draw()) for _ in range(self.rotations)]
        self.weight = (torch.randn(shape[1], device="cuda") + 1).requires_grad_()
        self.bias = torch.randn(shape[1], device="cuda").requires_grad_()

    def contenders(self) -> dict[str, Function]:
        eager = self._eager()
        fused = self.fusion != "bn"
        found = {"eager": eager, "compile": torch.compile(eager, fullgraph=True)}
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


def graph(make: Callable[[], list[Callable[[], Any]]], warm: bool) -> tuple[torch.cuda.CUDAGraph, int]:
    """All calls captured once (warm: the first one as often), and how many they are."""
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
    return captured, len(calls)


def medians(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Milliseconds a call: the contenders in turn, `rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (captured, calls) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            captured.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / calls)
    return {name: statistics.median(each) for name, each in times.items()}


def wall(case: Case, contenders: dict[str, Function], rounds: int) -> dict[str, float]:
    """Milliseconds of a forward and backward call from Python, launches not waited for one by one."""
    x, residual, dy = case.inputs[0]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                torch.autograd.grad(function(x, residual), (x, case.weight, case.bias), dy)
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / 20 * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def kernels_of(function: Function, case: Case) -> list[str]:
    """Names of the kernels that one forward and backward ran, for instance cuDNN's or ATen's own."""
    x, residual, dy = case.inputs[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(function(x, residual), x, dy)
        torch.cuda.synchronize()
    return sorted({event.key.split("<")[0] for event in profile.key_averages()})


def measure(case: Case, rounds: int) -> Iterable[dict[str, Any]]:
    """A row for each contender whose result is right."""
    contenders = case.contenders()
    errors = {name: case.error(function) for name, function in contenders.items()}
    wrong = {name: error for name, error in errors.items() if error > 16}
    for name, error in wrong.items():
        print(f"{case.key}: {name} is off by {error:.0f} units in the last place: no figure", file=sys.stderr)
    contenders = {name: function for name, function in contenders.items() if name not in wrong}
    figures: dict[str, dict[str, float]] = {}
    for temperature in ("cold", "warm"):
        for direction in ("forward", "backward"):
            graphs = {"copy": graph(case.copy, temperature == "warm")}
            for name, function in contenders.items():
                make = getattr(case, direction)
                graphs[name] = graph(lambda f=function, make=make: make(f), temperature == "warm")
            figures[f"{direction} {temperature}"] = medians(graphs, rounds)
    figures["wall"] = wall(case, contenders, max(rounds // 3, 3))
    for name, function in contenders.items():
        row = {"contender": name, **case.key, "error": errors[name], "kernels": kernels_of(function, case)}
        for what, times in figures.items():
            row[f"{what} ms"] = times[name]
            if "copy" in times:
                row[f"{what} ratio to copy"] = times["copy"] / times[name]
        yield row


def training_step(rounds: int) -> Iterable[dict[str, Any]]:
    """ResNet-50 under AMP bf16, channels_last, batch 128: torch's layers and ours, eager and compiled."""
    import torchvision

    for accelerated in (False, True):
        for compiled in (False, True):
            torch.manual_seed(0)
            x = torch.randn(128, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
            target = torch.randint(1000, (128,), device="cuda")
            net = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
            if accelerated:
                net = batchnorm.accelerate(net, x[:2])
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
            run = torch.compile(net) if compiled else net

            def step(run: Any = run, x: Tensor = x, target: Tensor = target, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = F.cross_entropy(run(x), target)
                loss.backward()
                optimizer.step()

            for _ in range(5):
                step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(rounds):
                begin = time.perf_counter()
                step()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) * 1e3)
            yield {
                "network": "ResNet-50, AMP bf16, channels_last, batch 128", "accelerated": accelerated,
                "compiled": compiled, "ms": statistics.median(times),
                "peak MB": torch.cuda.max_memory_allocated() / 2**20,
            }  # fmt: skip
            del net, run, optimizer, step


def environment() -> dict[str, str]:
    """What every row is true for."""
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    return {
        "device": torch.cuda.get_device_name(),
        "implementation": cuda.describe(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "batchnorm": batchnorm.__version__,
        "date": datetime.date.today().isoformat(),
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The rows of one case as a table."""
    first = rows[0]
    layout = "channels_last" if first["channels_last"] else "contiguous"
    table = Table(title=f"{tuple(first['shape'])} {first['dtype']} {layout} {first['fusion']}")
    columns = [key for key in first if key.endswith((" ms", " copy")) or key == "error"]
    for column in ("contender", *columns):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        table.add_row(row["contender"], *(f"{row[column]:.3g}" for column in columns))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="bf16 and the large shapes alone, fewer rounds")
    parser.add_argument("--step", action="store_true", help="also training steps of ResNet-50 (needs torchvision)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here, so there is nothing to measure", file=sys.stderr)
        return 2
    console, key, rows = Console(), environment(), []
    console.print(key)
    rounds = 15 if options.quick else 51
    for dtype in (torch.bfloat16,) if options.quick else (torch.bfloat16, torch.float32):
        for shape in SHAPES[:3] if options.quick else SHAPES:
            for last in (False, True) if len(shape) == 4 else (False,):
                for fusion in FUSIONS:
                    found = list(measure(Case(shape, dtype, last, fusion), rounds))
                    if found:
                        show(console, found)
                    rows += [{**key, **row} for row in found]
                    torch.cuda.empty_cache()
    if options.step:
        for row in training_step(rounds):
            console.print(row)
            rows.append({**key, **row})
    if options.out:
        partial = options.out.with_suffix(".tmp")
        partial.write_text(json.dumps(rows, indent=1))
        partial.replace(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
