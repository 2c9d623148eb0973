"""The table of docs/statistics-at-inference.md: errors of estimators of the population's statistics, by batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import batchnorm as bn

CHANNELS, SAMPLES, SIZES = 8, 8192, (2, 4, 8, 32)


def populations() -> Iterator[tuple[str, Tensor]]:
    """Heavy-tailed values around 3; once in random order, once ordered by a first feature, as data sorted by class."""
    values = torch.randn(SAMPLES, CHANNELS)
    values = torch.where(torch.rand(SAMPLES, 1) < 0.05, values * 8, values) + 3
    yield "random order", values
    yield "sorted", values.sort(dim=0).values


def fed(layer: nn.Module, batches: list[Tensor]) -> nn.Module:
    for batch in batches:
        layer(batch)
    return layer


def accumulated(batches: list[Tensor]) -> nn.Module:
    layer = bn.BatchNorm1d(CHANNELS, running="cumulative")
    with bn.accumulate(layer):
        return fed(layer, batches)


def updated(batches: list[Tensor]) -> nn.Module:
    net = nn.Sequential(nn.BatchNorm1d(CHANNELS))
    update_bn(batches, net)
    return net[0]


def calibrated(batches: list[Tensor], method: str) -> nn.Module:
    return bn.calibrate(nn.Sequential(bn.BatchNorm1d(CHANNELS)), batches, method=method)[0]


ESTIMATORS: dict[str, Callable[[list[Tensor]], nn.Module]] = {
    "torch.nn, `momentum=0.1`": lambda b: fed(nn.BatchNorm1d(CHANNELS), b),
    "torch's `swa_utils.update_bn`": updated,
    '`running="debiased", decay=0.99`': lambda b: fed(bn.BatchNorm1d(CHANNELS, running="debiased", decay=0.99), b),
    '`running="cumulative"`': lambda b: fed(bn.BatchNorm1d(CHANNELS, running="cumulative"), b),
    '`running="cumulative", running_var="biased"`': lambda b: fed(
        bn.BatchNorm1d(CHANNELS, running="cumulative", running_var="biased"), b
    ),
    "all in one `bn.accumulate`": accumulated,
    '`bn.calibrate(method="ioffe")`': lambda b: calibrated(b, "ioffe"),
    '`bn.calibrate(method="pooled")`': lambda b: calibrated(b, "pooled"),
}


def main() -> None:
    torch.manual_seed(0)
    for name, x in populations():
        mean, var = x.double().mean(0), x.double().var(0)
        print(f"\n{name}\n\n| estimator | " + " | ".join(f"batch {size}" for size in SIZES) + " |")
        print("|---|" + "---|" * len(SIZES))
        for estimator, measure in ESTIMATORS.items():
            cells = []
            for size in SIZES:
                layer = measure(list(x.split(size)))
                of_mean = ((layer.running_mean.double() - mean).abs() / var.sqrt()).max()
                of_var = (layer.running_var.double() / var - 1).abs().max()
                cells.append(f"{of_mean:.1e} / {of_var:.1e}")
            print(f"| {estimator} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
