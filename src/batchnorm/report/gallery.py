"""The gallery: one self-contained page of experiments, with figures, tables, verdicts and what made them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.errors import InputError
from batchnorm.lab.experiment import Experiment, Measure
from batchnorm.lab.results import Finding, Result, Table
from batchnorm.report import drawing, lab_figures
from batchnorm.report.pages import render, write_page
from batchnorm.writing import write_text

KINDS = {"reproduced": "win", "tie": "tie", "not reproduced": "loss", "note": "note"}


@dataclass(frozen=True)
class Section:
    """One experiment on the page."""

    experiment: Experiment
    result: Result
    figure: str
    columns: list[str]
    rows: list[list[str]]
    findings: tuple[Finding, ...]
    settings: list[tuple[str, str]]
    changed: str
    counts: dict[str, int]


def write_gallery(
    path: str | Path,
    experiments: Sequence[Experiment],
    results: Sequence[Result],
    *,
    title: str = "What batch normalization does",
    note: str = "",
    images: str | Path | None = None,
) -> Path:
    """Write the page; it needs no other file and no network.

    Args:
        path: of the HTML file.
        experiments, results: what was run, and what it gave, in the same order.
        title: of the page.
        note: one or two sentences below it, such as why the settings are what they are.
        images: a folder that gets each figure as NAME-light.svg and NAME-dark.svg too.

    Raises:
        InputError: no results, or the folder cannot be written.
    """
    if not results:
        raise InputError("gallery: got no results; expected at least one experiment's")
    sections = [_section(e, r, images) for e, r in zip(experiments, results, strict=True)]
    page = render(
        "gallery",
        title=title,
        note=note,
        sections=sections,
        kinds=KINDS,
        seeds=results[0].seeds,
        environment=results[0].environment,
        totals=dict(Counter(finding.kind for result in results for finding in result.findings)),
        minutes=sum(result.seconds for result in results) / 60,
        drawn=drawing.available(),
    )
    return write_page("gallery", path, page)


def _section(experiment: Experiment, result: Result, images: str | Path | None) -> Section:
    table = Table(result.trials)
    columns = [name for name in experiment.measures if table.arms(name)]
    arms = [
        arm for arm in table.arms() if any(name in trial.values[arm] for trial in result.trials for name in columns)
    ]
    full = experiment.config.plain()
    changed = [f"{name} {_value(full[name])}" for name, value in result.config.items() if value != full[name]]
    return Section(
        experiment=experiment,
        result=result,
        figure=_figure(experiment, result, images),
        columns=[experiment.measures[name].label for name in columns],
        rows=[[arm, *(_cell(table(arm, name), experiment.measures[name]) for name in columns)] for arm in arms],
        findings=result.findings,
        settings=[(name.replace("_", " "), _value(value)) for name, value in _shown(result.config)],
        changed=", ".join(changed),
        counts=dict(Counter(finding.kind for finding in result.findings)),
    )


def _shown(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that the page lists."""
    return [
        (name, value) for name, value in config.items() if name != "insert" and (name, value) != ("arguments", None)
    ]


def _figure(experiment: Experiment, result: Result, images: str | Path | None) -> str:
    if not drawing.available():
        return ""
    if images is not None:
        Path(images).mkdir(parents=True, exist_ok=True)
        with drawing.styled(experiment.name):
            svg = drawing.svg(lab_figures.draw(experiment, result))
        write_text(Path(images) / f"{experiment.name}-light.svg", svg)
        write_text(Path(images) / f"{experiment.name}-dark.svg", drawing.dark(svg))
    alternative = f"{experiment.title}: {'; '.join(p.title for p in experiment.panels)}"
    return drawing.both(
        experiment.name, alternative, lambda narrow: lab_figures.draw(experiment, result, narrow=narrow)
    )


def _cell(values: Sequence[float], measure: Measure) -> str:
    """Mean ± standard deviation over the seeds; how many are infinite, which is never."""
    finite = [measure.scale * v for v in values if math.isfinite(v)]
    never = sum(math.isinf(v) for v in values)
    if not finite:
        return f"never in {never}" if never else "–"
    text = f"{statistics.fmean(finite):{measure.format}}"
    if len(finite) > 1:
        text += f" ± {statistics.stdev(finite):{measure.format}}"
    text = text.replace("-", "\N{MINUS SIGN}")  # a line may end behind a hyphen
    return text + (f" (never in {never})" if never else "")


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)
