"""Loss landscape, gradient predictiveness, effective beta-smoothness (Santurkar et al. 2018, Figure 4)."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import partial

from batchnorm.lab.experiment import ACCURACY, Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.instruments import Descent, Recorder, descent, loss_surface
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, divergences, expect_more


@dataclass(frozen=True)
class LandscapeConfig(Config):
    """Args: probes: readings of the instruments over the training; points: of the loss surface, along each axis."""

    probes: int = 50
    points: int = 15


def trial(config: LandscapeConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    for arm, net in (("batch norm", task.normalized()), ("without", task.plain())):
        probe = partial(descent, learning_rate=config.lr)
        recorder = Recorder(net, {"descent": probe}, every=config.every(config.probes))
        history = train(net, task, before_step=lambda step, batch, recorder=recorder: recorder(batch))
        steps, found = zip(*recorder.records["descent"], strict=True)
        out.curve("band", arm, steps, [min(f.losses) for f in found], [max(f.losses) for f in found])
        out.curve("predictiveness", arm, steps, [max(f.gradient_distances) for f in found])
        out.curve("smoothness", arm, steps, [f.smoothness for f in found])
        surface = loss_surface(net, _batch(task), points=config.points, seed=task.seed)
        out.map("surface", arm, surface.offsets, surface.offsets, surface.losses)
        history.note(out, arm, **_summary(found))
    return out


def _batch(task: Task) -> tuple[object, object]:
    size = task.config.batch_size
    return task.data.x_train[:size], task.data.y_train[:size]


def _summary(found: tuple[Descent, ...]) -> dict[str, float]:
    """Means over the training, and the same in units of the loss and of the gradient's norm."""
    widths = [max(f.losses) - min(f.losses) for f in found]
    changes = [max(f.gradient_distances) for f in found]
    norms = [f.gradient_norm or math.nan for f in found]
    return {
        "band": statistics.fmean(widths),
        "change": statistics.fmean(changes),
        "smoothness": statistics.fmean(f.smoothness for f in found),
        "relative band": statistics.fmean(w / (f.loss or math.nan) for w, f in zip(widths, found, strict=True)),
        "relative change": statistics.fmean(c / norm for c, norm in zip(changes, norms, strict=True)),
    }


def verdict(config: LandscapeConfig, table: Table) -> list[Finding]:
    claims = {
        "band": "Width of the loss band (nats)",
        "change": "Largest change of the gradient along the step",
        "smoothness": "Effective beta-smoothness",
    }
    beside = {
        "relative band": "The band's width in units of the loss",
        "relative change": "The change in units of the gradient's norm",
    }
    return [
        *(
            expect_more(table, name, "without", "batch norm", what, scale=1, unit="", digits=3)
            for name, what in claims.items()
        ),
        *(
            compare(table, name, "without", "batch norm", what, scale=1, unit="", digits=2)
            for name, what in beside.items()
        ),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="landscape",
    title="Loss landscape",
    question="Is the loss smoother along the gradient with batch norm, and does the gradient hold for longer?",
    setting="At steps of the training, the loss and its gradient at seven points of the gradient's line, 1/2 to 4 "
    "learning rates away, on the training batch. VGG on CIFAR-10 in the source; here a small convolution network, at "
    "a rate at which it trains without batch norm too. At a fifth of it, it stays on a plateau, where the loss is "
    "flat and all three numbers are smaller without batch norm: the claim is about training that moves.",
    criterion="Loss band, change of the gradient and effective beta-smoothness are each smaller with batch norm, "
    "averaged over the training (95 % interval of the paired difference). If the loss itself is lower, so is the "
    "band: the same in units of loss and gradient is told beside.",
    source="Santurkar et al. 2018, section 3.1 and Figure 4; Li et al. 2018 (surface).",
    config=LandscapeConfig(network="convnet", data="mnist5k", steps=2000),
    quick={"data": "digits", "steps": 800, "probes": 40},
    smoke={"steps": 12, "probes": 3, "points": 3, "data": "digits"},
    seconds=(8, 128),
    trial=trial,
    verdict=verdict,
    panels=(
        Panel("band", "Loss along the gradient", y="loss (nats)", yscale="log"),
        Panel("predictiveness", "Change of the gradient", y="largest ||g - g'||", yscale="log"),
        Panel("smoothness", "Effective beta-smoothness", y="beta", yscale="log"),
        Panel("surface", "Loss around the end", kind="map", x="direction 1", y="direction 2"),
    ),
    measures={
        "best": ACCURACY,
        "band": Measure("loss band (nats)", 1, ".3f"),
        "change": Measure("change of g", 1, ".3f"),
        "smoothness": Measure("beta-smoothness", 1, ".2f"),
        "relative band": Measure("band / loss", 1, ".2f"),
        "relative change": Measure("change / ||g||", 1, ".2f"),
    },
    caption="Band: range of the loss along the step, first seed. Gradient and smoothness: median and range over the "
    "seeds. Maps: loss on a plane of two random, filter-normalized directions around the trained network.",
)
