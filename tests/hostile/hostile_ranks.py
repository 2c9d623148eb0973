"""What two ranks do in test_ranks.py: RANK FOLDER; each kind of trouble in a process group of its own."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.errors import SynchronizationError

LIMIT = 3.0  # seconds, of the group
began = [0.0]  # when the last exchange was begun


def net(channels=4, **options):
    layers = [("linear", nn.Linear(channels, channels)), ("norm", nn.BatchNorm1d(channels)), ("relu", nn.ReLU())]
    made = nn.Sequential()
    for name, layer in layers:
        made.add_module(name, layer)
    return bn.convert(made, process_group="world", **options)


def step(network, channels=4, dtype=torch.float32):
    began[0] = time.monotonic()
    network(torch.randn(6, channels, dtype=dtype)).sum().backward()


def channels(rank):
    step(net(4 + rank), 4 + rank)


def dtype(rank):
    kind = torch.float64 if rank else torch.float32
    step(net().to(kind), dtype=kind)


def options(rank):
    step(net(running="cumulative") if rank else net())


def layer(rank):
    network = net()
    network.add_module("norm2", bn.BatchNorm1d(4, process_group="world"))
    network[3].label = "norm2"
    step(network[3] if rank else network)


def batches(rank):
    network = net()
    for _ in range(3 - rank):
        step(network)
    time.sleep(2 * LIMIT * rank)  # at other work


def stuck(rank):
    network = net()
    step(network)
    if rank:
        time.sleep(2 * LIMIT)
        return
    step(network)


def recipe(rank):
    """That of docs/synchronized.md: the exchanges of DistributedDataParallel come before those of the layers."""
    network = nn.parallel.DistributedDataParallel(net())
    with bn.rank_errors():
        step(network)
        if rank:
            time.sleep(2 * LIMIT)
            return
        step(network)


def calibration(rank):
    """A rank that gets stuck while it measures; what is left of the network is what was there."""
    network = net().eval()
    before = network.norm.running_mean.clone()

    def data():
        yield torch.randn(6, 4)
        if rank:
            time.sleep(2 * LIMIT)
        yield torch.randn(6, 4)

    try:
        bn.calibrate(network, data(), process_group="world", timeout=LIMIT)
    finally:
        assert torch.equal(network.norm.running_mean, before)


def calibration_of_others(rank):
    bn.calibrate(net(4 + rank).eval(), [torch.randn(6, 4 + rank)], process_group="world", timeout=LIMIT)


def dead(rank):
    network = net()
    step(network)
    if rank:
        os._exit(0)
    step(network)


KINDS = [channels, dtype, options, layer, batches, stuck, recipe, calibration, calibration_of_others, dead]


def meet(path, rank):
    """Wait for the other rank, which may be longer at the kind before than the limit of the next group."""
    Path(f"{path}{rank}").touch()
    for _ in range(6000):
        if Path(f"{path}{1 - rank}").exists():
            return
        time.sleep(0.01)


def main(rank, folder):
    torch.set_num_threads(1)
    for kind in KINDS:
        meet(folder / f"{kind.__name__}-", rank)
        store = dist.FileStore(str(folder / kind.__name__), 2)
        limit = datetime.timedelta(seconds=LIMIT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        began[0] = time.monotonic()
        try:
            kind(rank)
            told = "no error"
        except SynchronizationError as error:
            told = str(error)
        print(f"{kind.__name__}\t{time.monotonic() - began[0]:.2f}\t{told}", flush=True)
        time.sleep(0.1)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
