"""What an experiment found: one trial a seed, and what they say together, as data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["reproduced", "tie", "not reproduced", "note"]

VERDICT_SEEDS = 5  # with fewer, a run reproduces nothing and refutes nothing

# Quantiles of Student's t for two-sided 95 %, by degrees of freedom; beyond, the normal's.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


@dataclass(frozen=True)
class Finding:
    """One statement about an experiment's claim: whether this run reproduces it, in words."""

    kind: Kind
    text: str


def settled(findings: Iterable[Finding], seeds: int) -> tuple[Finding, ...]:
    """The findings of so many seeds: of fewer than VERDICT_SEEDS each verdict becomes a note that says so."""
    if seeds >= VERDICT_SEEDS:
        return tuple(findings)
    few = f"{seeds} seed{'s' * (seeds != 1)}: a verdict needs {VERDICT_SEEDS}."
    return tuple(f if f.kind == "note" else Finding("note", f"{f.text} ({few})") for f in findings)


@dataclass
class Trial:
    """What one seed gave. An arm is one of the things compared, such as "batch norm".

    Args:
        seed: of the split, the initial weights, the batches and everything random.
        values: by arm and measure, one number each.
        curves: by panel and arm, (x, y), or a band (x, low, high) or (x, low, middle, high).
        maps: by panel and arm, (x, y, z) with ``z[i][j]`` at ``(x[j], y[i])``.
        diverged: by arm, the first step whose loss was not finite.
        seconds: of the processor that the trial took.
    """

    seed: int
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    maps: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    diverged: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, arm: str, **values: float) -> None:
        """Measures of an arm."""
        self.values.setdefault(arm, {}).update(values)

    def curve(self, panel: str, arm: str, x: Iterable[float], *y: Iterable[float]) -> None:
        """A curve of an arm; a band with two y (low, high) or three (low, middle, high)."""
        self.curves.setdefault(panel, {})[arm] = [list(x), *map(list, y)]

    def map(self, panel: str, arm: str, x: Sequence[float], y: Sequence[float], z: Sequence[Sequence[float]]) -> None:
        """A map of an arm: ``z[i][j]`` at ``(x[j], y[i])``."""
        self.maps.setdefault(panel, {})[arm] = [list(x), list(y), [list(row) for row in z]]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and half of its 95 % confidence interval (Student's t)."""

    mean: float
    half_width: float

    @property
    def kind(self) -> Literal["more", "tie", "less"]:
        """Whether the interval lies above, around or below 0."""
        if not abs(self.mean) > self.half_width:
            return "tie"
        return "more" if self.mean > 0 else "less"

    def text(self, unit: str = "", scale: float = 1.0, digits: int = 1) -> str:
        """As in ``+1.2 ± 0.4 points``."""
        mean = round(scale * self.mean, digits) + 0.0  # which makes 0 of -0
        if math.isinf(self.half_width):
            return f"{mean:+.{digits}f}{unit} (one seed)"
        return f"{mean:+.{digits}f} ± {scale * self.half_width:.{digits}f}{unit}"


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of a - b, seed by seed. One seed alone is always a tie; pairs with a NaN are left out."""
    pairs = [x - y for x, y in zip(a, b, strict=True) if math.isfinite(x - y)]
    if not pairs:
        return Difference(math.nan, math.inf)
    if len(pairs) == 1:
        return Difference(pairs[0], math.inf)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    t = _T[len(pairs) - 2] if len(pairs) - 2 < len(_T) else 2.0
    return Difference(statistics.fmean(pairs), t * error)


def points(a: Difference) -> str:
    """A difference of two accuracies, in percentage points."""
    return a.text(" points", scale=100)


@dataclass(frozen=True)
class Result:
    """Everything that an experiment found.

    Args:
        name: of the experiment.
        config: the settings, plain values.
        data: what the data are, of the first seed.
        trials: one a seed, in the order of the seeds.
        findings: the verdict.
        environment: versions and machine.
    """

    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    trials: tuple[Trial, ...]
    findings: tuple[Finding, ...]
    environment: dict[str, str]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the trials."""
        return tuple(trial.seed for trial in self.trials)

    @property
    def seconds(self) -> float:
        """Of the processor, of all trials together."""
        return sum(trial.seconds for trial in self.trials)


class Table:
    """The values of trials by arm and measure, seed by seed: what verdicts are made of."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials

    def arms(self, measure: str | None = None) -> list[str]:
        """In the order in which they were added; with `measure`, those that have it."""
        names: dict[str, None] = {}
        for trial in self.trials:
            for arm, values in trial.values.items():
                if measure is None or measure in values:
                    names.setdefault(arm)
        return list(names)

    def __call__(self, arm: str, measure: str) -> list[float]:
        """One value a seed; NaN where a seed has none."""
        return [trial.values.get(arm, {}).get(measure, math.nan) for trial in self.trials]

    def mean(self, arm: str, measure: str) -> float:
        """Over the seeds that have a finite one; NaN if none has."""
        values = [v for v in self(arm, measure) if math.isfinite(v)]
        return statistics.fmean(values) if values else math.nan

    def difference(self, a: str, b: str, measure: str) -> Difference:
        """Of arm a and arm b in a measure, paired by seed."""
        return difference(self(a, measure), self(b, measure))
