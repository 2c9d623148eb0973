"""The figures of the lab, drawn from its panels: the same colour and dash for the same thing everywhere."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from batchnorm.lab.experiment import Experiment, Panel
from batchnorm.lab.results import Result, Table, Trial
from batchnorm.report import drawing, plots
from batchnorm.report.drawing import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SOLID, DASHED, DOTTED, MIXED = "-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (5, 1.5, 1.2, 1.5))

# Colour and dash of each arm; blue is batch norm, vermilion is without it, wherever they stand.
STYLES: dict[str, tuple[str, Any]] = {
    "batch norm": ("batch norm", SOLID),
    "without": ("baseline", DASHED),
    "batch norm ×1": ("batch norm", SOLID),
    "batch norm ×5": ("sky", SOLID),
    "batch norm ×30": ("green", DOTTED),
    "batch norm ×5 sigmoid": ("purple", MIXED),
    "without sigmoid": ("gray", DOTTED),
    "noisy batch norm": ("purple", MIXED),
    "renormalization": ("purple", MIXED),
    "group norm": ("green", DOTTED),
    "ghost": ("sky", SOLID),
    "ghost 4": ("sky", SOLID),
    "batch + group": ("orange", DASHED),
    "Theorem 4.1": ("batch norm", SOLID),
    "Theorem 4.2": ("purple", MIXED),
    "moving average": ("orange", DASHED),
    "ioffe": ("green", DOTTED),
    "pooled": ("sky", SOLID),
    "sequential": ("purple", MIXED),
    "exact": ("gray", DOTTED),
    "momentum 0.001": ("sky", SOLID),
    "momentum 0.01": ("green", DOTTED),
    "momentum 0.1": ("batch norm", SOLID),
    "momentum 0.5": ("purple", MIXED),
    "momentum 1": ("orange", DASHED),
    "alpha 0": ("batch norm", SOLID),
    "alpha tuned": ("green", DOTTED),
    "no decay": ("gray", DOTTED),
    "weights": ("batch norm", SOLID),
    "weights, gamma, beta": ("orange", DASHED),
    "gamma toward 1": ("green", DOTTED),
    "dropout before": ("orange", DASHED),
    "dropout before, calibrated": ("green", DOTTED),
    "dropout after": ("batch norm", SOLID),
    "dropout after, calibrated": ("sky", SOLID),
    "source": ("orange", DASHED),
    "adapted, prior 16": ("sky", SOLID),
    "adapted, prior 0": ("batch norm", SOLID),
    "tent": ("green", DOTTED),
    "before activation": ("batch norm", SOLID),
    "after activation": ("purple", MIXED),
    "batch norm, standardized": ("batch norm", SOLID),
    "batch norm, raw": ("sky", DOTTED),
    "without, standardized": ("baseline", DASHED),
    "without, raw": ("orange", MIXED),
    "padding masked": ("batch norm", SOLID),
    "padding counted": ("orange", DASHED),
}
OTHERS = (("purple", MIXED), ("green", DOTTED), ("sky", SOLID), ("orange", DASHED), ("gray", DOTTED))
MAX_ROW = 3
LEGEND_LETTERS = 95  # that fit beside each other, a handle counted as 8
LEGEND_ROW = 0.22  # inches
BAND = ("15th", "50th", "85th")  # the lines of a band of percentiles
MOST_ENDS = 9  # lines that are named at their ends; more get a legend
LONGEST_END = 16  # letters of a name beside one of several panels, or on a phone; a longer one leaves no room for lines
DECADE = 10  # a logarithmic axis over less has hardly a number
CELL_TEXTS = 64  # maps of no more cells get their values written into them


def draw(experiment: Experiment, result: Result, *, narrow: bool = False) -> Figure:
    """One figure with all panels of an experiment; a map takes a place for each of its arms.

    Args:
        experiment, result: what was run, and what it gave.
        narrow: for a phone, the panels below each other.
    """
    from matplotlib.figure import Figure

    places = [(panel, arm) for panel in experiment.panels for arm in _arms_apart(panel, result)]
    columns = 1 if narrow else 2 if len(places) == 4 else min(len(places), MAX_ROW)
    rows = math.ceil(len(places) / columns)
    width, height = (drawing.NARROW, 3.1) if narrow else (drawing.WIDE, 3.4 if columns > 1 else 3.9)
    figure = Figure(figsize=(width, height * rows + 0.45), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    named = _Styles(result)
    for (panel, arm), place in zip(places, axes, strict=False):
        if panel.kind == "map":
            _map(figure, place, panel, arm, result, most_ticks=5 if narrow else 9)
        elif panel.kind == "dots":
            _dots(place, panel, result, named)
        else:
            _lines(place, panel, result, named)
            place.tick_params(axis="x", labelrotation=40 if narrow and panel.categories else 0)
    lines = [(panel, place) for (panel, _), place in zip(places, axes, strict=False) if panel.kind == "lines"]
    _same_axes(lines)
    _name_ends(lines, result, named, crowded=narrow or columns > 1)
    for place in axes[len(places) :]:
        place.set_visible(False)
    _legend(figure, axes, LEGEND_LETTERS // 2 if narrow else LEGEND_LETTERS)
    return figure


def _same_axes(lines: Sequence[tuple[Panel, Axes]]) -> None:
    """Panels of the same quantity have the same axis: else a comparison of two networks would not show."""
    by_quantity: dict[tuple[str, float], list[Axes]] = {}
    for panel, place in lines:
        by_quantity.setdefault((panel.y, panel.scale), []).append(place)
    for places in by_quantity.values():
        low, high = zip(*(place.get_ylim() for place in places), strict=True)
        log = any(place.get_yscale() == "log" for place in places) and min(low) > 0
        for place in places:
            place.set_yscale("log" if log else "linear")
            place.set_ylim(min(low), max(high))
            if log:
                _plain_numbers(place.yaxis)


def _name_ends(lines: Sequence[tuple[Panel, Axes]], result: Result, named: _Styles, *, crowded: bool) -> None:
    """Name each arm at the end of its line, in the last panel that has it; the lines of a band by their percentiles.
    Many arms, and long names where there is little room, are left to the legend."""
    last: dict[str, int] = {}
    for number, (panel, _) in enumerate(lines):
        if not panel.categories:
            arms = [arm for arm in _arms_of(panel, result) if len(_curves(panel, arm, result)[0]) == 2]
            last.update(dict.fromkeys(arms, number))
    at_ends = len(last) <= MOST_ENDS and not (crowded and any(len(arm) > LONGEST_END for arm in last))
    for number, (panel, place) in enumerate(lines):
        ends = []
        for arm in _arms_of(panel, result):
            curve = _curves(panel, arm, result)[0]
            color = named[arm]["color"]
            if len(curve) > 2:
                names = BAND if len(curve) == len(BAND) + 1 else [""] * (len(curve) - 1)
                ends += [
                    (curve[0][-1], panel.scale * y[-1], name, color) for y, name in zip(curve[1:], names, strict=True)
                ]
            elif not panel.categories and at_ends:
                line = next(line for line in place.get_lines() if line.get_gid() == arm)
                line.set_label("")
                points: Any = line.get_xydata()
                if last[arm] == number and len(points):
                    x, y = map(float, points[-1])
                    ends.append((x, y, arm, color))
        plots.label_ends(place, ends, gap=0.085)


class _Styles:
    """Colour and dash of each arm: as STYLES has it, else one that no other arm of the result has."""

    def __init__(self, result: Result) -> None:
        spare = itertools.cycle(OTHERS)
        self.found: dict[str, tuple[str, Any]] = {}
        for arm in _all_arms(result):
            self.found[arm] = STYLES[arm] if arm in STYLES else next(spare)

    def __getitem__(self, arm: str) -> dict[str, Any]:
        color, dash = self.found[arm]
        return {"color": COLORS[color], "ls": dash}


def _all_arms(result: Result) -> list[str]:
    names: dict[str, None] = {}
    for trial in result.trials:
        groups: list[Iterable[str]] = [*trial.curves.values(), *trial.maps.values(), trial.values]
        names.update(dict.fromkeys(itertools.chain(*groups)))
    return list(names)


def _arms_apart(panel: Panel, result: Result) -> list[str]:
    """The arms of a map, which get a place each; anything else has one place."""
    return list(result.trials[0].maps.get(panel.name, {})) if panel.kind == "map" else [""]


def _arms_of(panel: Panel, result: Result) -> list[str]:
    return list(dict.fromkeys(arm for trial in result.trials for arm in trial.curves.get(panel.name, {})))


def _curves(panel: Panel, arm: str, result: Result) -> list[Sequence[Sequence[float]]]:
    return [trial.curves[panel.name][arm] for trial in result.trials if arm in trial.curves.get(panel.name, {})]


def _lines(axes: Axes, panel: Panel, result: Result, named: _Styles) -> None:
    arms = _arms_of(panel, result)
    for number, arm in enumerate(arms):
        curves = _curves(panel, arm, result)
        if len(curves[0]) > 2:
            _band(axes, panel, curves[0], arm, named)
        elif panel.categories:
            _categories(axes, panel, curves, arm, (number - (len(arms) - 1) / 2) * 0.8 / len(arms), named)
        else:
            _median(axes, panel, curves, arm, named)
            _mark_divergence(axes, panel, result.trials, arm, named)
    _name_axes(axes, panel)
    if panel.categories:
        axes.set_xticks(range(len(panel.categories)), panel.categories)
        axes.grid(visible=False, axis="x")
    if axes.get_xscale() == "log":
        _ticks(axes, sorted({x for t in result.trials for c in t.curves.get(panel.name, {}).values() for x in c[0]}))


def _median(axes: Axes, panel: Panel, curves: Sequence[Sequence[Sequence[float]]], arm: str, named: _Styles) -> None:
    by_x: dict[float, list[float]] = {}
    for x, y in curves:
        for at, value in zip(x, y, strict=True):
            if math.isfinite(value):
                by_x.setdefault(at, []).append(panel.scale * value)
    x = sorted(by_x)
    marker = "o" if len(x) <= 12 else None
    style = named[arm]
    axes.plot(x, [statistics.median(by_x[at]) for at in x], label=arm, gid=arm, marker=marker, ms=4, **style)
    if len(curves) > 1:
        low, high = [min(by_x[at]) for at in x], [max(by_x[at]) for at in x]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.16, lw=0)


def _band(axes: Axes, panel: Panel, curve: Sequence[Sequence[float]], arm: str, named: _Styles) -> None:
    x, *ys = curve
    ys = [[panel.scale * value for value in y] for y in ys]
    style = named[arm]
    axes.fill_between(x, ys[0], ys[-1], color=style["color"], alpha=0.25, lw=0)
    for y in ys:
        axes.plot(x, y, color=style["color"], ls=style["ls"], lw=1.1)


def _categories(
    axes: Axes, panel: Panel, curves: Sequence[Sequence[Sequence[float]]], arm: str, offset: float, named: _Styles
) -> None:
    style = named[arm]
    for x, y in curves:
        places = [at + offset for at in x]
        values = [panel.scale * value for value in y]
        axes.plot(places, values, "o", ms=4.5, alpha=0.6, mew=0, color=style["color"])
    for i, at in enumerate(curves[0][0]):
        mean = statistics.fmean(panel.scale * y[i] for _, y in curves)
        ends = [at + offset - 0.08, at + offset + 0.08]
        axes.plot(ends, [mean, mean], color=style["color"], lw=2.4, label=None if i else arm)


def _dots(axes: Axes, panel: Panel, result: Result, named: _Styles) -> None:
    table = Table(result.trials)
    arms = table.arms(panel.name)
    for row, arm in enumerate(arms):
        values = [panel.scale * v for v in table(arm, panel.name) if math.isfinite(v)]
        style = named[arm]
        axes.plot(values, [row] * len(values), "o", ms=5, alpha=0.55, mew=0, color=style["color"])
        if values:
            mean = statistics.fmean(values)
            axes.plot([mean, mean], [row - 0.25, row + 0.25], color=style["color"], lw=2.2)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_title(panel.title, loc="left")
    axes.set(xlabel=panel.x, xlim=panel.limits)
    if panel.xscale == "log" and _is_wide(axes, "x"):
        axes.set_xscale("log")


def _map(figure: Figure, axes: Axes, panel: Panel, arm: str, result: Result, *, most_ticks: int) -> None:
    maps = [trial.maps[panel.name] for trial in result.trials if panel.name in trial.maps]
    x, y, _ = maps[0][arm]
    means = {name: _mean_map([m[name][2] for m in maps], panel.scale) for name in maps[0]}
    shown = [v for values in means.values() for row in values for v in row if math.isfinite(v)]
    low, high = panel.limits
    low, high = min(shown, default=0) if low is None else low, max(shown, default=1) if high is None else high
    values = means[arm]
    norm: Any = {"vmin": low, "vmax": high}
    if panel.yscale == "log" and high >= DECADE * max(low, 1e-12):
        from matplotlib.colors import LogNorm

        norm = {"norm": LogNorm(max(low, 1e-12), max(high, 2e-12))}
    drawn = axes.pcolormesh(range(len(x) + 1), range(len(y) + 1), values, cmap="cividis", **norm)
    written = len(x) * len(y) <= CELL_TEXTS
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isfinite(value):
                axes.text(j + 0.5, i + 0.5, "×", ha="center", va="center")
            elif written:
                shade = (value - low) / ((high - low) or 1)
                color = "#000000" if shade > 0.55 else "#ffffff"
                axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
    axes.set_title(f"{panel.title}:\n{arm}", loc="left")
    axes.set(xlabel=panel.x, ylabel=panel.y)
    for ticks, places, most in ((axes.set_xticks, x, most_ticks), (axes.set_yticks, y, 9)):
        shown_at = range(0, len(places), (len(places) - 1) // 2 if len(places) > 9 else 1 + (len(places) > most))
        ticks([i + 0.5 for i in shown_at], [f"{round(places[i], 9):.3g}" for i in shown_at])
    axes.grid(visible=False)
    if arm == list(means)[-1]:
        figure.colorbar(drawn, ax=axes, pad=0.02).outline.set_visible(False)


def _mean_map(maps: Sequence[Sequence[Sequence[float]]], scale: float) -> list[list[float]]:
    """Cell by cell over the seeds with a finite value there."""

    def mean(values: Iterator[float]) -> float:
        finite = [scale * v for v in values if math.isfinite(v)]
        return statistics.fmean(finite) if finite else math.nan

    return [[mean(iter(cells)) for cells in zip(*rows, strict=True)] for rows in zip(*maps, strict=True)]


def _mark_divergence(axes: Axes, panel: Panel, trials: Sequence[Trial], arm: str, named: _Styles) -> None:
    if panel.x != "training step":
        return
    for trial in trials:
        x, y = trial.curves.get(panel.name, {}).get(arm, ([], []))[:2]
        if arm in trial.diverged and len(x):
            axes.plot(x[-1], panel.scale * y[-1], "x", ms=8, mew=2, color=named[arm]["color"])


def _name_axes(axes: Axes, panel: Panel) -> None:
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.set_title(panel.title, loc="left")
    if panel.xscale == "log" and _is_wide(axes, "x"):
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    if panel.yscale == "log" and _is_wide(axes, "y"):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    axes.set_ylim(*panel.limits)


def _is_wide(axes: Axes, which: str) -> bool:
    """Whether the values along an axis span a decade."""
    place = "xy".index(which)
    drawn: list[Any] = [line.get_xydata() for line in axes.get_lines()]
    values = [float(point[place]) for points in drawn for point in points]
    values = [value for value in values if value > 0 and math.isfinite(value)]
    return bool(values) and max(values) >= DECADE * min(values)


def _plain_numbers(axis: Axis) -> None:
    from matplotlib.ticker import NullFormatter

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _ticks(axes: Axes, values: list[float]) -> None:
    """A sweep's own values as ticks, where they are few."""
    if len(values) <= 8:
        from matplotlib.ticker import NullLocator

        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(values, [f"{value:g}" for value in values])


def _legend(figure: Figure, axes: Any, letters: int) -> None:
    handles: dict[str, Any] = {}
    for place in axes:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = next((n for n in range(len(handles), 1, -1) if _width(list(handles), n) <= letters), 1)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (math.ceil(len(handles) / columns) - 1))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def _width(labels: Sequence[str], columns: int) -> int:
    """Letters beside each other in a legend, which fills column after column."""
    rows, longer = divmod(len(labels), columns)
    sizes = [rows + (number < longer) for number in range(columns)]
    rest = iter(labels)
    return sum(8 + max(map(len, itertools.islice(rest, size))) for size in sizes)
