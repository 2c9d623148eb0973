"""Internal covariate shift with and without batch norm (Santurkar et al. 2018, section 2.2)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import BatchNorm1d
from batchnorm.lab.experiment import ACCURACY, Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.instruments import CovariateShift, Recorder, covariate_shift
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import divergences, expect_no_less


@dataclass(frozen=True)
class CovariateShiftConfig(Config):
    """Args: probes: readings of the instrument; depth to linear_lr: of the linear network and its training."""

    probes: int = 40
    depth: int = 25
    width: int = 20
    samples: int = 200
    linear_steps: int = 1000
    linear_lr: float = 1e-4


def trial(config: CovariateShiftConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    for arm, net in (("batch norm", task.normalized()), ("without", task.plain())):
        recorder = Recorder(
            net,
            {"shift": lambda net, batch: covariate_shift(net, batch, config.lr)},
            every=config.every(config.probes),
        )
        history = train(net, task, before_step=lambda step, batch, recorder=recorder: recorder(batch))
        history.note(out, arm, **_note(out, "network", arm, recorder))
    for arm in ("batch norm", "without"):
        out.add(
            arm,
            **{f"linear {name}": v for name, v in _note(out, "linear", arm, _linear(config, task.seed, arm)).items()},
        )
    return out


def _linear(config: CovariateShiftConfig, seed: int, arm: str) -> Recorder:
    """A deep linear network on one batch of Gaussian samples with linear targets, trained on the squared error."""
    torch.manual_seed(seed)
    width = config.width
    x = torch.randn(config.samples, width)
    target = x @ torch.randn(width, width) / width**0.5
    net = nn.Sequential()
    for depth in range(config.depth):
        net.append(nn.Linear(width, width, bias=False))
        if arm == "batch norm" and depth < config.depth - 1:
            net.append(BatchNorm1d(width))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        error: Tensor = (net(batch) - target).square().mean()
        return error

    recorder = Recorder(
        net,
        {"shift": lambda net, batch: covariate_shift(net, batch, config.linear_lr, loss=loss)},
        every=max(1, config.linear_steps // config.probes),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=config.linear_lr)
    for _ in range(config.linear_steps):
        recorder(x)
        optimizer.zero_grad()
        value = loss(net, x)
        if not torch.isfinite(value):
            break
        value.backward()
        optimizer.step()
    return recorder


def _note(out: Trial, panel: str, arm: str, recorder: Recorder) -> dict[str, float]:
    """Curves of the means over the layers but the first, whose shift is 0, and their means over the training."""
    steps, found = zip(*recorder.records["shift"], strict=True)
    norms, cosines = [_mean(f, "relative_norms") for f in found], [_mean(f, "cosines") for f in found]
    out.curve(f"{panel} norm", arm, steps, norms)
    out.curve(f"{panel} cosine", arm, steps, cosines)
    return {"norm": statistics.fmean(norms), "angle": 1 - statistics.fmean(cosines)}


def _mean(found: CovariateShift, name: str) -> float:
    return statistics.fmean(getattr(found, name)[1:])


def verdict(config: CovariateShiftConfig, table: Table) -> list[Finding]:
    labels = {
        "norm": "Shift of the gradient, network (share of its norm)",
        "angle": "1 - cosine, network",
        "linear norm": "Shift of the gradient, linear network (share of its norm)",
        "linear angle": "1 - cosine, linear network",
    }
    return [
        *(
            expect_no_less(table, name, "batch norm", "without", label, scale=1, unit="", digits=3)
            for name, label in labels.items()
        ),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="covariate_shift",
    title="Internal covariate shift",
    question="Does batch norm reduce internal covariate shift, as the paper of 2015 supposed?",
    setting="The gradient of a layer before and after only the layers before it have taken their step, on the same "
    "batch; mean over the layers. For the network of Figure 1, and for 25 linear layers on Gaussian data, full-batch.",
    criterion="Santurkar et al.: batch norm does not reduce it. Reproduced where the shift with batch norm is not "
    "smaller (95 % interval of the paired difference).",
    source="Santurkar et al. 2018, Definition 2.1 and Figure 3; hypothesis: Ioffe & Szegedy 2015.",
    config=CovariateShiftConfig(steps=15_000, linear_steps=5000),
    quick={"steps": 2000, "linear_steps": 400, "probes": 20},
    smoke={"steps": 8, "linear_steps": 4, "probes": 2, "depth": 4, "data": "digits"},
    seconds=(6, 62),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel("network norm", "Network: shift of the gradient", y="||G - G'|| / ||G||", yscale="log"),
        Panel("network cosine", "Network: direction", y="cosine of G and G'"),
        Panel("linear norm", "25 linear layers: shift", y="||G - G'|| / ||G||", yscale="log"),
        Panel("linear cosine", "25 linear layers: direction", y="cosine of G and G'"),
    ),
    measures={
        "best": ACCURACY,
        "norm": Measure("||G - G'|| / ||G||", 1, ".3f"),
        "angle": Measure("1 - cosine", 1, ".4f"),
        "linear norm": Measure("linear: ||G - G'|| / ||G||", 1, ".3f"),
        "linear angle": Measure("linear: 1 - cosine", 1, ".4f"),
    },
    caption="Shift relative to the gradient's norm (0: none) and cosine (1: none); median and range over the seeds.",
)
