"""Statistics shared by ranks: forward and backward of one layer against the same by hand, on 1 to 4 processes.

Each rank keeps its batch, so the work grows with the ranks. More ranks than cores share these: what a rank then waits
for is the others' arithmetic, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import batchnorm as bn

from .machine import ROOT
from .rows import Row

RANKS = (1, 2, 3, 4)
SHAPES = ((8, 64, 56, 56), (32, 256))
TOLERANCE = 1e-4


class ByHand(torch.autograd.Function):
    """What one writes with torch.distributed: local mean and variance, an all-gather, torch's operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        axes, shape = [0, *range(2, x.ndim)], (1, -1) + (1,) * (x.ndim - 2)
        var, mean = torch.var_mean(x, axes, correction=0)
        count = x.new_full((1,), x.numel() / x.shape[1])
        mine = torch.cat([mean, var, count])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        means, variances, counts = torch.stack(ranks).split([x.shape[1], x.shape[1], 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        inv_std = (var + eps).rsqrt().view(shape)
        mean = mean.view(shape)
        ctx.save_for_backward(x, weight, mean, inv_std, total)
        return (x - mean) * inv_std * weight.view(shape) + bias.view(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mean, inv_std, total = ctx.saved_tensors
        axes = [0, *range(2, x.ndim)]
        xhat = (x - mean) * inv_std
        d_weight, d_bias = (dy * xhat).sum(axes), dy.sum(axes)
        sums = torch.stack([d_weight, d_bias])
        dist.all_reduce(sums)
        mean_dy_xhat, mean_dy = (each.view(mean.shape) / total for each in sums)
        return weight.view(mean.shape) * inv_std * (dy - mean_dy - xhat * mean_dy_xhat), d_weight, d_bias, None


def measure(ranks: int, shape: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """The rows of one layer on so many processes, which torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "benchmarks.ranks", str(rounds), *map(str, shape)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def rank(rounds: int, shape: tuple[int, ...]) -> None:
    """What each process does; the first one writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    kinds = {2: (bn.BatchNorm1d, nn.BatchNorm1d), 4: (bn.BatchNorm2d, nn.BatchNorm2d)}[len(shape)]
    ours, alone = (
        kinds[0](shape[1], process_group="world", update="never"),
        kinds[1](shape[1], track_running_stats=False),
    )
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours,
        "by hand": lambda x: ByHand.apply(x, alone.weight, alone.bias, 1e-5),
        "torch, not synchronized": alone,
    }
    times: dict[str, list[float]] = {name: [] for name in layers}
    results = {}
    for k in range(rounds + 3):  # the first ones do not count
        for name, layer in layers.items():
            x = x.detach().requires_grad_()
            dist.barrier()
            begin = time.perf_counter()
            y = layer(x)
            y.backward(dy)
            if k >= 3:
                times[name].append(time.perf_counter() - begin)
            results[name] = y.detach(), x.grad
    pairs = zip(results["ours"], results["by hand"], strict=True)
    off = torch.tensor(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    dist.all_reduce(off, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        columns: Row = {"suite": "ranks", "ranks": dist.get_world_size(), "shape": list(shape), "dtype": "float32"}
        columns |= {"direction": "forward+backward", "rounds": rounds}
        seconds = {name: median(each) for name, each in times.items()}
        for name, value in seconds.items():
            row = {**columns, "contestant": name, "ms": value * 1e3, "layers_per_second": 1 / value}
            if name == "ours":
                row |= {"x_by_hand": seconds["by hand"] / value, "error": float(off)}
            if off > TOLERANCE:
                row = {**columns, "contestant": name, "absent": f"off by {float(off):.3g} from the other, no figure"}
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank(int(sys.argv[1]), tuple(map(int, sys.argv[2:])))
