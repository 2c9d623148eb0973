"""Exact population statistics beside the forward passes alone, in training mode and without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.moments import Moments

from .networks import NETWORKS
from .rows import Row, compare
from .timing import Phases, alternate

SAMPLES = {"mlp": 50_000, "resnet18": 256, "mobilenet": 256}
"""What the networks are passed over: 50,000 where that takes seconds, less where it would take minutes."""


def error(net: nn.Sequential, batches: list[Tensor]) -> float:
    """Largest relative distance of the first layer's running statistics from float64 ones of all data at once."""
    with torch.no_grad():
        truth = Moments.of(torch.cat([net[0](batch) for batch in batches]))
    first = next(m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert first.running_mean is not None
    assert first.running_var is not None
    var = truth.variance(unbiased=True)
    off_mean = (first.running_mean - truth.mean).abs() / (truth.mean.abs() + var.sqrt())
    return float(torch.maximum(off_mean, (first.running_var / var - 1).abs()).max())


def measure(network: str, norm: str, seconds: float) -> Iterator[Row]:
    """`x_limit` is how many times the time of the forward passes `calibrate` takes."""
    make, (batch, *sample) = NETWORKS[network]
    torch.manual_seed(0)
    net = make(norm)
    assert isinstance(net, nn.Sequential)
    count = SAMPLES[network]
    batches = list(torch.randn(min(count, 2048), *sample).split(batch))
    batches = (batches * -(-count // 2048))[: -(-count // batch)]
    columns = {
        "suite": "calibrate", "network": network, "norm": norm, "samples": count, "dtype": "float32",
        "shape": [batch, *sample], "order": "planar",
    }  # fmt: skip
    batchnorm.calibrate(net, batches)
    off = error(net, batches)
    if off > 1e-6:
        yield {**columns, "contestant": "ours", "absent": f"statistics are off by {off:.3g}, no figure"}
        return

    def forward() -> None:
        net.train()
        with torch.no_grad():
            for x in batches:
                net(x)

    def timed(run: Callable[[], object]) -> Callable[[], Phases]:
        def once() -> Phases:
            begin = time.perf_counter()
            run()
            return {"passes": time.perf_counter() - begin}

        return once

    runs = {"forward": timed(forward), "ours": timed(lambda: batchnorm.calibrate(net, batches))}
    times, rounds = alternate(runs, seconds, least=3)
    yield from compare({**columns, "rounds": rounds}, times, {"ours": off}, limit="forward")
