"""Verdicts in words, from differences paired by seed."""

from __future__ import annotations

import math
import statistics

from batchnorm.lab.results import Difference, Finding, Kind, Table

_KINDS: dict[str, Kind] = {"more": "reproduced", "tie": "tie", "less": "not reproduced"}


def expect_more(
    table: Table,
    measure: str,
    more: str,
    less: str,
    what: str,
    *,
    scale: float = 100,
    unit: str = " points",
    digits: int = 1,
) -> Finding:
    """The claim that arm `more` has more of a measure than arm `less`: the 95 % interval of the difference decides."""
    found = table.difference(more, less, measure)
    return Finding(_KINDS[found.kind], _sentence(table, measure, more, less, what, found, scale, unit, digits))


def expect_no_less(
    table: Table,
    measure: str,
    arm: str,
    other: str,
    what: str,
    *,
    scale: float = 100,
    unit: str = " points",
    digits: int = 1,
) -> Finding:
    """The claim that an arm has no less of a measure than another: a tie is enough."""
    found = table.difference(arm, other, measure)
    kind: Kind = "not reproduced" if found.kind == "less" or math.isnan(found.mean) else "reproduced"
    return Finding(kind, _sentence(table, measure, arm, other, what, found, scale, unit, digits))


def compare(
    table: Table,
    measure: str,
    a: str,
    b: str,
    what: str,
    *,
    scale: float = 100,
    unit: str = " points",
    digits: int = 1,
) -> Finding:
    """A difference that no claim is about."""
    found = table.difference(a, b, measure)
    return Finding("note", _sentence(table, measure, a, b, what, found, scale, unit, digits))


def _sentence(
    table: Table, measure: str, a: str, b: str, what: str, found: Difference, scale: float, unit: str, digits: int
) -> str:
    first, second = (f"{scale * table.mean(arm, measure):.{digits}f}" for arm in (a, b))
    words = {"more": "more", "less": "less", "tie": "no difference that the seeds can tell"}[found.kind]
    if found.kind == "tie" and math.isnan(found.mean):
        words = "nothing to compare"
    return f"{what}: {a} {first}, {b} {second} ({found.text(unit, scale, digits)}), {words}."


def median_ratio(table: Table, measure: str, a: str, b: str) -> float:
    """The median over seeds of a / b; NaN where no seed has both."""
    ratios = [x / y for x, y in zip(table(a, measure), table(b, measure), strict=True) if math.isfinite(x) and y > 0]
    return statistics.median(ratios) if ratios else math.nan


def divergences(table: Table) -> list[Finding]:
    """Which arms met a loss that was not finite, and in how many seeds."""
    counts: dict[str, int] = {}
    for trial in table.trials:
        for arm in trial.diverged:
            counts[arm] = counts.get(arm, 0) + 1
    return [
        Finding("note", f"{arm}: diverged in {count} of {len(table.trials)} seeds (counted as guessing).")
        for arm, count in counts.items()
    ]
