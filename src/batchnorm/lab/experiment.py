"""What an experiment is: a question, a setting, a trial for one seed, and the number that decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from batchnorm.lab.results import Finding, Result, Table, Trial
from batchnorm.lab.runner import run
from batchnorm.lab.settings import Config, checked

if TYPE_CHECKING:
    from batchnorm.lab.task import Task


@dataclass(frozen=True)
class Panel:
    """A drawing of what trials hold under `name`: curves, maps, or one measure as dots.

    Args:
        name: of the curves or maps in a trial, or of a measure.
        title, x, y: in words, with units.
        kind: "lines" (median and range over seeds; a band as the first seed gave it), "dots" (one dot a seed, a row
            for each arm) or "map" (mean, one for each arm).
        xscale, yscale: "linear" or "log".
        scale: that values are multiplied by, as 100 for percent.
        limits: of the value axis or of the map's colours.
        categories: names of the places 0, 1, ... of the x axis; there are then no lines.
    """

    name: str
    title: str
    x: str = "training step"
    y: str = "test accuracy (%)"
    kind: Literal["lines", "dots", "map"] = "lines"
    xscale: Literal["linear", "log"] = "linear"
    yscale: Literal["linear", "log"] = "linear"
    scale: float = 1.0
    limits: tuple[float | None, float | None] = (None, None)
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """A column of the table: how a measure is called, scaled and printed."""

    label: str
    scale: float = 1.0
    format: str = ".1f"


ACCURACY = Measure("test accuracy (%)", 100)
BEST = Measure("best test accuracy (%)", 100)
FINAL = Measure("final test accuracy (%)", 100)


def accuracy_panel(**changes: Any) -> Panel:
    """Test accuracy over training."""
    return Panel("accuracy", "Test accuracy", scale=100, **changes)


@dataclass(frozen=True)
class Experiment:
    """An experiment; call it to run it.

    Args:
        name: on the command line and in `batchnorm.lab`.
        title: in a few words.
        question: that it asks.
        setting: what is compared under what, and where that departs from the source.
        criterion: the number that counts as reproducing the claim.
        source: of the claim.
        config: the settings of the full run.
        quick, smoke: settings that differ in a quick run, and in a test.
        seconds: that a seed of the quick and of the full run takes on one core, about.
        trial: what one seed gives.
        verdict: what the trials say about the claim.
        panels: of the figure, from left to right.
        measures: the columns of the table.
        caption: how the figure is read.
    """

    name: str
    title: str
    question: str
    setting: str
    criterion: str
    source: str
    config: Config
    trial: Callable[[Any, Task], Trial]
    verdict: Callable[[Any, Table], list[Finding]]
    panels: tuple[Panel, ...]
    measures: Mapping[str, Measure]
    caption: str
    quick: Mapping[str, Any] = field(default_factory=dict)
    smoke: Mapping[str, Any] = field(default_factory=dict)
    seconds: tuple[float, float] = (10, 100)

    def configure(self, *, quick: bool = False, **changes: Any) -> Config:
        """The settings with changes, checked.

        Raises:
            InputError: an unknown setting or a value out of range.
        """
        return checked(self.config, self.name, {**(self.quick if quick else {}), **changes})

    def __call__(self, *, seeds: int | tuple[int, ...] = 5, quick: bool = False, **options: Any) -> Result:
        """Run it; see `batchnorm.lab.run`."""
        return run(self, seeds=seeds, quick=quick, **options)
