"""Standardized inputs against inputs as they come, with and without batch norm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm import Standardize
from batchnorm.lab.experiment import ACCURACY, FINAL, Experiment, accuracy_panel
from batchnorm.lab.fitting import fit
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, divergences, expect_more
from batchnorm.training.datasets import Dataset


@dataclass(frozen=True)
class StandardizationConfig(Config):
    """Args: decades: by which the scales of the features differ."""

    decades: float = 2.0


def trial(config: StandardizationConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    raw = _unequal(task.data, config.decades, task.seed)
    layer = Standardize(raw.x_train.shape[1]).fit(raw.x_train)
    standardized = dataclasses.replace(raw, x_train=layer(raw.x_train), x_test=layer(raw.x_test))
    settings: dict[str, Any] = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "every": config.every(),
    }
    for name, flat in (("raw", raw), ("standardized", standardized)):
        x_train, x_test = (x.reshape(len(x), *task.data.input_shape) for x in (flat.x_train, flat.x_test))
        data = dataclasses.replace(flat, x_train=x_train, x_test=x_test)
        for arm, net in (("batch norm", task.normalized()), ("without", task.plain())):
            fit(net, data, seed=task.seed, **settings).note(out, f"{arm}, {name}")
    return out


def _unequal(data: Dataset, decades: float, seed: int) -> Dataset:
    """The features (N, F) on scales drawn log-uniformly over so many decades, and shifted by a scale."""
    generator = torch.Generator().manual_seed(seed)
    features = data.x_train[0].numel()
    scale = 10 ** (decades * (torch.rand(features, generator=generator) - 0.5))
    shift = scale * torch.randn(features, generator=generator)
    parts = ((x.flatten(1) * scale + shift).float() for x in (data.x_train, data.x_test))
    x_train, x_test = parts
    return dataclasses.replace(data, x_train=x_train, x_test=x_test)


def verdict(config: StandardizationConfig, table: Table) -> list[Finding]:
    claims = [
        expect_more(table, "best", f"{arm}, standardized", f"{arm}, raw", "Best accuracy (%)")
        for arm in ("without", "batch norm")
    ]
    beside = compare(
        table, "best", "batch norm, raw", "without, standardized", "One without the other: best accuracy (%)"
    )
    return [*claims, beside, *divergences(table)]


EXPERIMENT = Experiment(
    name="standardization",
    title="Standardized inputs",
    question="Does it help to standardize the inputs, and does batch norm in the hidden layers make that needless?",
    setting="Features on unequal scales, as in tables: each pixel times a factor drawn log-uniformly over two "
    "decades, plus a shift. Standardized by the training part, or as they come.",
    criterion="Standardized inputs give a higher best accuracy, without and with batch norm (95 % intervals of the "
    "paired differences).",
    source="LeCun et al. 1998, Efficient BackProp, section 4.3.",
    config=StandardizationConfig(steps=10_000),
    quick={"steps": 1200},
    smoke={"steps": 3, "data": "digits"},
    seconds=(6, 43),
    trial=trial,
    verdict=verdict,
    panels=(accuracy_panel(),),
    measures={"best": ACCURACY, "final": FINAL},
    caption="Test accuracy under the moving averages; median and range over the seeds.",
)
