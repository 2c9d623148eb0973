"""What a user's typed code looks like: mypy reads it (`make lint`), and it names the whole public face."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import batchnorm as bn


def layers(x: Tensor, images: Tensor, volumes: Tensor, frames: Tensor) -> list[Tensor]:
    ys: list[Tensor] = [
        bn.BatchNorm1d(64, activation="relu")(x, x),
        bn.BatchNorm2d(64, ghost_size=32, eps=1e-3)(images),
        bn.BatchNorm3d(64, renorm=bn.Renorm(r_max=3, d_max=5))(volumes),
        bn.Standardize(64).fit(x)(x),
        bn.standardize(x),
        bn.StepBatchNorm(64, max_steps=8)(frames),
    ]
    for recurrent in (bn.LSTM(64, 8), bn.GRU(64, 8), bn.RNN(64, 8)):
        ys.append(recurrent(frames)[0])
    for cell in (bn.GRUCell(64, 8), bn.RNNCell(64, 8)):
        ys.append(cell(x))
    ys.append(bn.LSTMCell(64, 8)(x)[0])
    mean: Tensor = bn.Moments.of(x).mean
    return [*ys, mean, bn.functional.batch_norm(x, None, None, training=True)]


def life(net: nn.Sequential, example: Tensor, batches: list[Tensor], optimizer: torch.optim.Optimizer) -> nn.Module:
    try:
        normalized: nn.Module = bn.insert(net, example)
    except bn.BatchNormError:
        normalized = bn.convert(net, example, ghost_size=32)
    normalized = bn.accelerate(bn.revert(normalized), example, channels_last=None)
    groups = bn.param_groups(normalized, weight_decay=5e-4)
    with bn.accumulate(normalized), bn.transaction(normalized, torch.optim.SGD(groups, lr=0.1)):
        bn.accumulate_exact(normalized, batches, lambda model, batch: model(batch).sum())
    print(bn.save_memory(normalized, example, budget=0.1).saved, bn.reuse_memory())
    with bn.recompute_outputs(), bn.no_update(normalized), bn.mode(normalized, source="batch"):
        normalized(example)
    normalized = bn.calibrate(normalized, batches)
    normalized = bn.restore(bn.adapt(normalized, batches, prior=16))
    normalized = bn.average_statistics(normalized, [normalized])
    normalized = bn.sync_running_statistics(normalized)
    with bn.rank_errors("world"):
        normalized(example)
    normalized = bn.set_mode(normalized, update="never")
    normalized = bn.unfreeze(bn.freeze(normalized))
    bn.use_domain(normalized, 0)
    with bn.mask_padding(normalized, torch.tensor([3, 2])):
        normalized(example)
    bn.tune_example_weight(normalized, [(example, example)])
    print(bn.summary(normalized, example), bn.diagnose(normalized, batches), bn.preview_export(normalized, example))
    bn.show_config()
    with bn.watch(normalized, alerts="gap > 1 nat for 3 evaluations") as watch:
        print(watch.report(), bn.integrations.Life(normalized).state_dict())
    folded = bn.fold(normalized, example)
    print(bn.__version__, folded.certificate)
    return folded.model


def checkpoints(net: nn.Module, folder: Path, data: nn.parallel.DistributedDataParallel) -> None:
    bn.save_keras(net, folder / "weights.h5")
    bn.load_keras(net, folder / "weights.h5")
    bn.save_statistics(net, folder / "statistics.npz", "flax")
    keys: list[str] = bn.statistics_keys(net)
    print(keys)
    bn.load_flax(net, bn.to_flax(net))
    print(bn.read_statistics(folder / "weights.h5"), bn.load_statistics(net, folder / "weights.h5", "keras"))
    print(bn.load_run(folder), bn.to_keras(net), bn.joinable(data), bn.errors, bn.lab, bn.nn, bn.training)
