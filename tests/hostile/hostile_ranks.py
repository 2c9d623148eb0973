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
from batchnorm import exchanges
from batchnorm.errors import SynchronizationError
from batchnorm.pools import largest

LIMIT = 1.5  # seconds, where a rank is missing
PATIENT = 60.0  # of all other exchanges: a busy machine may be slow at them
exchanges.PATIENCE = 0.5
began = [0.0]  # when the last exchange was begun
place = [Path()]  # the folder in which the ranks meet


def limited():
    """From now on the exchanges of the group wait for LIMIT."""
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LIMIT))
    began[0] = time.monotonic()


def elsewhere(kind):
    """At other work, until the other rank has told what came of it."""
    meet_of(place[0] / f"told-{kind}-0")


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
    for _ in range(2):
        step(network)
    if rank:
        elsewhere("batches")
        return
    limited()
    step(network)


def stuck(rank):
    network = net()
    step(network)
    if rank:
        network[0](torch.randn(6, 4))
        elsewhere("stuck")
        return
    limited()
    network(torch.randn(6, 4))


def recipe(rank):
    """That of docs/synchronized.md: the exchanges of DistributedDataParallel come before those of the layers."""
    network = nn.parallel.DistributedDataParallel(net())
    with bn.rank_errors():
        step(network)
        if rank:
            elsewhere("recipe")
            return
        limited()
        step(network)


def calibration(rank):
    """A rank that gets stuck while it measures; what is left of the network is what was there."""
    network = net().eval()
    before = network.norm.running_mean.clone()

    def data():
        yield torch.randn(6, 4)
        if rank:
            elsewhere("calibration")
        yield torch.randn(6, 4)

    try:
        began[0] = time.monotonic()
        bn.calibrate(network, data(), process_group="world", timeout=2 * LIMIT)
    finally:
        assert torch.equal(network.norm.running_mean, before)


def calibration_of_others(rank):
    bn.calibrate(net(4 + rank).eval(), [torch.randn(6, 4 + rank)], process_group="world", timeout=PATIENT)


def dead(rank):
    network = net()
    step(network)
    if rank:
        os._exit(0)
    limited()
    step(network)


def two():
    """A network of two normalizations that both ranks have run once, so that their options have been compared."""
    network = nn.Sequential()
    network.add_module("norm", nn.BatchNorm1d(4))
    network.add_module("norm2", nn.BatchNorm1d(4))
    bn.convert(network, process_group="world")
    step(network)
    limited()
    return network


def more_layers(rank):
    network = two()
    if rank:
        network.add_module("norm3", bn.BatchNorm1d(4, process_group="world"))
        network[2].label = "norm3"
    step(network)


def skipped(rank):
    network = two()
    step(network[1] if rank else network)


def order(rank):
    """Layers of one size, which no size tells apart."""
    network = two()
    step(nn.Sequential(network[1], network[0]) if rank else network)


def twice(rank):
    network = two()
    step(nn.Sequential(network[0], network[0]) if rank else network)


def recurrent(rank):
    """Recurrent layers of one size, in another order; first sequences of other lengths, which is no trouble."""
    layers = [bn.LSTM(3, 4, batch_norm="frame", max_steps=9, recurrent=True, process_group="world") for _ in range(2)]
    for k, made in enumerate(layers):
        for name, module in made.named_modules():
            if name:
                module.label = f"lstm{k}.{name}"
        made(torch.randn(5 + rank, 6, 3))
    limited()
    layers[rank](torch.randn(5, 6, 3))


def steps(rank):
    """The number of time steps, which every rank must take, is compared by layer as well."""
    layers = [bn.LSTM(3, 4, batch_norm="frame", max_steps=9, recurrent=True, process_group="world") for _ in range(2)]
    pools = [layer.norm_hh_l0.agreed_pool(torch.empty(1, 4)) for layer in layers]
    limited()
    assert pools[1].place == pools[0].place + 1 > 1
    assert largest(3 + rank, pools[0], torch.device("cpu")) == 4
    largest(3, pools[rank], torch.device("cpu"))


def mode(rank):
    """In evaluation nothing is exchanged."""
    network = two()
    step(network.eval() if rank else network)
    if rank:
        elsewhere("mode")


def sizes_and_later_dtypes(rank):
    """No trouble: the statistics are those of all samples."""
    norm, x = net().norm, torch.arange(40.0).view(10, 4) ** 2
    for kind in (torch.float32, torch.float64 if rank else torch.float32):
        norm.to(kind)((x[:3] if rank else x[3:]).to(kind))
    torch.testing.assert_close(norm.running_var.double(), 0.81 + 0.19 * x.double().var(0), rtol=1e-5, atol=0)


KINDS = [channels, dtype, options, layer, batches, stuck, recipe, calibration, calibration_of_others]
KINDS += [more_layers, skipped, order, twice, recurrent, steps, mode, sizes_and_later_dtypes, dead]


def meet(path, rank):
    """Wait for the other rank, which may be longer at the kind before than the limit of the next group."""
    Path(f"{path}{rank}").touch()
    meet_of(Path(f"{path}{1 - rank}"))


def meet_of(path):
    """Wait until the other rank has left this file."""
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)


def main(rank, folder):
    torch.set_num_threads(1)
    place[0] = folder
    for kind in KINDS:
        name = kind.__name__
        meet(folder / f"{name}-", rank)
        store = dist.FileStore(str(folder / name), 2)
        limit = datetime.timedelta(seconds=PATIENT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
        began[0] = time.monotonic()
        try:
            kind(rank)
            told = "no error"
        except SynchronizationError as error:
            told = str(error)
        print(f"{name}\t{time.monotonic() - began[0]:.2f}\t{told}", flush=True)
        (folder / f"told-{name}-{rank}").touch()
        time.sleep(0.1)  # a rank that leaves ends what the other still reads
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
