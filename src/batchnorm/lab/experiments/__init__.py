"""All experiments, by name, in the order of the gallery."""

from __future__ import annotations

import difflib

from batchnorm.errors import InputError
from batchnorm.lab.experiment import Experiment
from batchnorm.lab.experiments import (
    batch_group,
    covariate_shift,
    domain_shift,
    dropout,
    equalities,
    estimators,
    example_weighing,
    figure1,
    ghost,
    landscape,
    momentum,
    noisy,
    padding,
    placement,
    sensitivity,
    small_batches,
    speedup,
    standardization,
    weight_decay,
)

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        figure1,
        speedup,
        sensitivity,
        landscape,
        covariate_shift,
        noisy,
        equalities,
        estimators,
        momentum,
        example_weighing,
        ghost,
        weight_decay,
        batch_group,
        small_batches,
        padding,
        dropout,
        domain_shift,
        placement,
        standardization,
    )
}


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(f"lab: no experiment {name!r}; expected one of {', '.join(EXPERIMENTS)}.{hint}")
    return EXPERIMENTS[name]
