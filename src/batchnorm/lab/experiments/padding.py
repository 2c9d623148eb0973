"""Sequences of unequal length: padding counted in the statistics, or masked."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import BatchNorm1d, convert
from batchnorm.errors import InputError
from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial, difference, points
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task, replace_norms
from batchnorm.lab.verdicts import expect_more
from batchnorm.training.datasets import Dataset
from batchnorm.training.networks import build_network


class SequenceNetwork(nn.Module):
    """Two convolutions over time with batch norm, the mean over valid time, and a linear layer.

    Takes x (N, C, L) and lengths (N,); places past a sequence's length are zeros, in and out of each block.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv1d(c, 32, 3, padding=1, bias=False) for c in (in_channels, 32)])
        self.norms = nn.ModuleList([BatchNorm1d(32) for _ in range(2)])
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        valid = (torch.arange(x.shape[-1]) < lengths[:, None])[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x), lengths=lengths)) * valid
        pooled: Tensor = self.head(x.sum(-1) / lengths[:, None])
        return pooled


@dataclass(frozen=True)
class PaddingConfig(Config):
    """Args: paddings: lengths of the padded batch, in lengths of the longest sequence.

    A network of your own takes (x, lengths), and hands `lengths` to its batch norm layers.
    """

    network: Any = SequenceNetwork
    paddings: tuple[float, ...] = (1, 2, 4, 8)


class _Counting(nn.Module):
    """Batch norm that does not hear of lengths."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class _WithLengths(nn.Module):
    """Takes the sequences with their mask as the last channel."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x[:, :-1], x[:, -1].sum(-1).long())
        return y


def trial(config: PaddingConfig, task: Task) -> Trial:
    if len(task.data.input_shape) != 3:
        raise InputError(
            f"lab padding: samples have shape {task.data.input_shape}, expected images, rows of which are time"
        )
    out = Trial(task.seed)
    found: dict[str, list[float]] = {"padding masked": [], "padding counted": []}
    gradients: dict[str, list[Tensor]] = {arm: [] for arm in found}
    for padding in config.paddings:
        data = _sequences(task.data, padding, task.seed)
        for arm, accuracies in found.items():
            torch.manual_seed(task.seed)
            channels = data.x_train.shape[1] - 1
            net = build_network(config.network, (channels, data.x_train.shape[2]), data.num_classes)
            _check(net)
            if arm == "padding counted":
                replace_norms(net, _Counting)
            gradients[arm].append(_gradient(_WithLengths(net), data, config.batch_size))
            padded = Task("padding", dataclasses.replace(config, data=data), task.seed)
            accuracies.append(train(_WithLengths(net), padded, every=None).final)
    for arm, accuracies in found.items():
        out.curve("accuracy", arm, config.paddings, accuracies)
        first = gradients[arm][0]
        moved = max(float((gradient - first).norm() / first.norm()) for gradient in gradients[arm])
        spread = max(accuracies) - min(accuracies)
        out.add(arm, least=accuracies[0], most=accuracies[-1], range=spread, gradient=moved)
    return out


def _gradient(net: nn.Module, data: Dataset, batch_size: int) -> Tensor:
    """Of the loss of the first batch in the weights that training starts from, in float64."""
    twin = copy.deepcopy(net).double().train()
    loss = nn.functional.cross_entropy(twin(data.x_train[:batch_size].double()), data.y_train[:batch_size])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])


def _check(net: nn.Module) -> None:
    if not any(isinstance(module, _BatchNorm) for module in net.modules()):
        raise InputError(
            "lab padding: the network has no batch normalization; give one whose layers take lengths, "
            "as bn.insert(net, example) puts them in"
        )
    convert(net)


def _sequences(data: Dataset, padding: float, seed: int) -> Dataset:
    """Images (N, 1, H, W) as sequences of rows, (N, W + 1, H padding): each cut after a random number of its rows, from
    half of them up, and padded with zeros. The last channel is the mask."""
    generator = torch.Generator().manual_seed(seed)

    def cut(x: Tensor) -> Tensor:
        rows = x.mean(1).transpose(1, 2)
        height = rows.shape[-1]
        lengths = torch.randint(height // 2, height + 1, (len(x), 1), generator=generator)
        valid = (torch.arange(height) < lengths)[:, None].float()
        return nn.functional.pad(torch.cat([rows * valid, valid], 1), (0, round(height * (padding - 1))))

    return dataclasses.replace(data, x_train=cut(data.x_train), x_test=cut(data.x_test))


def verdict(config: PaddingConfig, table: Table) -> list[Finding]:
    most = f"{config.paddings[-1]:g} times the longest sequence"
    masked, counted = (max(table(f"padding {arm}", "gradient")) for arm in ("masked", "counted"))
    moved = max(table("padding masked", "range"))
    fall = difference(table("padding counted", "least"), table("padding counted", "most"))
    return [
        Finding(
            "reproduced" if masked <= 1e-12 else "not reproduced",
            f"Masked, the gradient of a batch moves by {masked:.0e} of its norm at most over all paddings and seeds; "
            f"counted, by {counted:.2g}.",
        ),
        expect_more(table, "most", "padding masked", "padding counted", f"Accuracy, padded to {most} (%)"),
        Finding("note", f"Counted, the accuracy falls by {points(fall)} from the least to the most padding."),
        Finding(
            "note",
            f"Masked, the final accuracies of a seed differ by {100 * moved:.1f} points at most: float32 rounds other "
            "lengths otherwise, and training amplifies it.",
        ),
    ]


EXPERIMENT = Experiment(
    name="padding",
    title="Padding counted or masked",
    question="What does it cost to count padding in the batch's statistics?",
    setting="Rows of images as sequences, cut at random between half and all of their length, in batches padded with "
    "zeros to 1 to 8 times the longest. A small convolution network over time masks its outputs in both cases; only "
    "the statistics of its batch norm layers count the padding or not.",
    criterion="Masked, the gradient of the first batch does not depend on the padding (float64, 1e-12 of its norm); at "
    "the most padding the accuracy is higher than with padding counted (95 % interval of the paired difference).",
    source="Common practice for packed sequences; the claim is our own.",
    config=PaddingConfig(steps=3000),
    quick={"data": "digits", "steps": 300},
    smoke={"data": "digits", "steps": 2, "paddings": (1, 2)},
    seconds=(6, 136),
    trial=trial,
    verdict=verdict,
    panels=(Panel("accuracy", "Final test accuracy", x="padded length / longest sequence", xscale="log", scale=100),),
    measures={
        "least": Measure("least padding (%)", 100),
        "most": Measure("most padding (%)", 100),
        "range": Measure("range over paddings (points)", 100),
        "gradient": Measure("first gradient moves by (share of its norm)", format=".1g"),
    },
    caption="Test accuracy at the end, under the running statistics; median and range over the seeds.",
)
