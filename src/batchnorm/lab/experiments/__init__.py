"""All experiments, by name, in the order of the gallery."""

from __future__ import annotations

import difflib

from batchnorm.errors import InputError
from batchnorm.lab.experiment import Experiment
from batchnorm.lab.experiments import covariate_shift, figure1, landscape, speedup

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        figure1,
        speedup,
        landscape,
        covariate_shift,
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
