"""Drawings of a training run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchnorm.report import drawing
from batchnorm.report.drawing import COLORS as COLORS
from batchnorm.report.drawing import VARIABLES as VARIABLES
from batchnorm.report.drawing import available as available
from batchnorm.training.results import Curve, TrainResult
from batchnorm.writing import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES: dict[str, Any] = {"batch norm": "-", "baseline": (0, (5, 2))}


@dataclass(frozen=True)
class Plot:
    """A drawing: `svg` with CSS variables for the page, and a sentence for who cannot see it."""

    name: str
    title: str
    alternative: str
    svg: str


def draw(result: TrainResult, folder: Path) -> list[Plot]:
    """Draw a run's figures; writes NAME.svg and NAME.png into `folder` and returns the page's."""
    drawings: list[tuple[str, str, str, Callable[[TrainResult, bool], Figure]]] = [
        (
            "accuracy",
            "Test score over training",
            f"{_score(result)} against training steps, with and without batch norm.",
            _accuracy,
        ),
        (
            "loss",
            "Loss over training",
            f"{_unit(result).capitalize()} against training steps, on training batches and test samples.",
            _loss,
        ),
        (
            "percentiles",
            "What one hidden unit's activation receives",
            "15th, 50th and 85th percentile of one unit's input to its activation over training.",
            _percentiles,
        ),
    ]
    if result.predictions is not None:
        drawings.append(
            (
                "residuals",
                "What the network says, and by how much it is wrong",
                "Predictions against targets of the test part, and the differences against the predictions.",
                _residuals,
            )
        )
    folder.mkdir(exist_ok=True)
    plots = []
    for name, title, alternative, draw_one in drawings:
        with drawing.styled(name):
            figure = draw_one(result, False)
            wide = drawing.svg(figure)
            write_text(folder / f"{name}.svg", wide)
            figure.set_layout_engine("none")  # as it lies in the first drawing
            drawing.save_png(figure, folder / f"{name}.png")
        shown = drawing.with_narrow(name, alternative, wide, functools.partial(draw_one, result))
        plots.append(Plot(name, title, alternative, shown))
    return plots


def _figure(narrow: bool, panels: int = 1, share: bool = True) -> tuple[Figure, Any]:
    """Panels beside each other, on a phone below each other, with the same axes."""
    from matplotlib.figure import Figure

    width, rows, columns = (drawing.NARROW, panels, 1) if narrow else (drawing.WIDE, 1, panels)
    figure = Figure(figsize=(width, (2.9 if narrow else 3.8) * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=share, sharex=share, squeeze=False).flatten()


def _is_regression(result: TrainResult) -> bool:
    return result.curves["batch norm"].task == "regression"


def _score(result: TrainResult) -> str:
    return "test R²" if _is_regression(result) else "test accuracy (%)"


def _unit(result: TrainResult) -> str:
    return "squared error (variances)" if _is_regression(result) else "cross-entropy (nats)"


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], gap: float = 0.075) -> None:
    """Label lines at their ends instead of in a legend, which covers them; labels that would meet are moved apart.

    Args:
        axes: with its limits set.
        ends: x, y, text and colour of each.
        gap: between two labels, as a share of the height.
    """
    axes.get_ylim()  # brings limits up to date that wait for a drawing
    to_share = axes.transData + axes.transAxes.inverted()
    shown = [(float(to_share.transform((x, y))[1]), text, color) for x, y, text, color in ends if math.isfinite(y)]
    placed = sorted((min(max(share, 0.0), 1.0), text, color) for share, text, color in shown if math.isfinite(share))
    heights: list[float] = []
    for share, _, _ in placed:
        heights.append(max(share, heights[-1] + gap) if heights else share)
    over = max(0.0, heights[-1] - 1) if heights else 0.0
    for height, (_, text, color) in zip(heights, placed, strict=True):
        axes.annotate(
            text,
            (1, height - over),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=drawing.for_words(color),
            annotation_clip=False,
        )


def label_points(axes: Axes, points: list[tuple[float, float, str, str]]) -> None:
    """Label points inside the axes, each at the nearest place where its words cover no line, axis or other words.

    Args:
        axes: with its limits and its labels set.
        points: x, y, text and colour of each.
    """
    if not points:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lays it out
    point = figure.dpi / 72
    size = drawing.FONT_SIZE * point
    left, bottom, right, top = axes.get_window_extent().extents
    taken = np.concatenate([_drawn(axes, line) for line in axes.lines])
    for x, y, text, color in points:
        at_x, at_y = axes.transData.transform((x, y))
        width, height = 0.56 * size * len(text), 1.3 * size

        shifts = [(dx * point, dy * point) for dx in range(-90, 91, 6) for dy in range(-120, 61, 6)]
        places = [
            (at_x + dx - (width if dx < 0 else 0), at_y + dy - height / 2)
            for dx, dy in sorted(shifts, key=lambda d: (math.hypot(*d), d[1], -d[0]))
        ]
        covered = functools.partial(_covered, taken, (width, height), (left, bottom + 3, right, top))
        x0, y0 = min(places, key=covered)  # the first of the best, which is the nearest
        axes.annotate(
            text,
            ((x0 - left) / (right - left), (y0 + height / 2 - bottom) / (top - bottom)),
            xycoords="axes fraction",
            va="center",
            color=drawing.for_words(color),
        )
        box = np.stack(np.meshgrid(np.linspace(x0, x0 + width, 20), np.linspace(y0, y0 + height, 5)), -1)
        taken = np.concatenate([taken, box.reshape(-1, 2)])


def _covered(
    taken: Any, size: tuple[float, float], bounds: tuple[float, float, float, float], corner: tuple[float, float]
) -> int:
    """How many of the points that are taken lie in a box, or three pixels beside it; many more outside the bounds."""
    (x0, y0), (width, height) = corner, size
    inside = (np.abs(taken - (x0 + width / 2, y0 + height / 2)) <= (width / 2 + 3, height / 2 + 3)).all(1).sum()
    outside = x0 < bounds[0] or y0 < bounds[1] or x0 + width > bounds[2] or y0 + height > bounds[3]
    return int(inside) + 10_000 * outside


def _drawn(axes: Axes, line: Any) -> Any:
    """Points of a line, a pixel or two apart, in pixels."""
    corners = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
    corners = corners[np.isfinite(corners).all(1)]
    pieces = [corners]
    for start, end in itertools.pairwise(corners):
        share = np.linspace(0, 1, int(min(2_000, np.abs(end - start).max() / 2)) + 2)[:, None]
        pieces.append(start + share * (end - start))
    return np.concatenate(pieces)


def _log_if_wide(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis where the values span a decade and more: on less it has hardly a number."""
    positive = [value for value in values if 0 < value < float("inf")]
    if positive and max(positive) >= 10 * min(positive):
        axes.set_yscale("log")


def _residuals(result: TrainResult, narrow: bool) -> Figure:
    assert result.predictions is not None
    y, said = result.predictions[:, 0].T.numpy(), result.predictions[:, 1].T.numpy()
    figure, (left, right) = _figure(narrow, panels=2, share=False)
    colors = [COLORS[name] for name in ("batch norm", "green", "purple", "sky", "orange", "gray")]
    for k, (target, output) in enumerate(zip(y, said, strict=True)):
        style: dict[str, Any] = {"color": colors[k % len(colors)], "ls": "", "marker": "o", "ms": 3, "alpha": 0.5}
        left.plot(target, output, label=f"target {k}", **style)
        right.plot(output, output - target, **style)
    ends = [float(y.min()), float(y.max())]
    left.plot(ends, ends, color=COLORS["text"], lw=0.8, ls=":")
    right.axhline(0, color=COLORS["text"], lw=0.8, ls=":")
    left.set(xlabel="target", ylabel="prediction")
    right.set(xlabel="prediction", ylabel="prediction less target")
    if len(y) > 1:
        left.legend(loc="upper left")
    return figure


def _accuracy(result: TrainResult, narrow: bool) -> Figure:
    figure, (axes,) = _figure(narrow)
    share = 1 if _is_regression(result) else 100
    top = 1.01 if _is_regression(result) else 101
    baseline = result.curves.get("baseline")
    reached: list[tuple[float, float, str, str]] = []
    for name, curve in result.curves.items():
        values = [share * value for value in curve.scores]
        axes.plot(curve.steps, values, color=COLORS[name], ls=DASHES[name])
        _mark_divergence(axes, curve, values, COLORS[name])
    if baseline is not None:
        best = baseline.best
        axes.axhline(share * best, color=COLORS["text"], lw=0.8, ls=":")
        for name, curve in result.curves.items():
            step = curve.first_step_at(best)
            if step:
                axes.plot(step, share * best, "o", ms=7, color=COLORS[name], clip_on=False, zorder=5)
                reached.append((step, share * best, f"step {step:,}", COLORS[name]))
    axes.set(xlabel="training step", ylim=(None, top))
    axes.set_title(_score(result), loc="left")
    if _is_regression(result):
        axes.set_ylim(bottom=max(-1.0, axes.get_ylim()[0]))
    label_ends(
        axes, [(c.steps[-1], share * c.scores[-1], _label(n, narrow), COLORS[n]) for n, c in result.curves.items()]
    )
    label_points(axes, reached)
    return figure


def _loss(result: TrainResult, narrow: bool) -> Figure:
    figure, axes = _figure(narrow, panels=2)
    everything: list[float] = []
    ends: dict[str, list[tuple[float, float, str, str]]] = {"train_loss": [], "test_loss": []}
    for panel, (title, field) in zip(
        axes, (("training batches", "train_loss"), ("test samples", "test_loss")), strict=True
    ):
        for name, curve in result.curves.items():
            values = [float("nan") if v is None else v for v in getattr(curve, field)]
            panel.plot(curve.steps, values, color=COLORS[name], ls=DASHES[name])
            ends[field].append((curve.steps[-1], values[-1], _label(name, narrow), COLORS[name]))
            everything += values
        panel.set_title(f"{title}: {_unit(result)}", loc="left")
        panel.set_xlabel("training step")
    _log_if_wide(axes[0], everything)
    if narrow:
        label_ends(axes[0], ends["train_loss"])
    label_ends(axes[1], ends["test_loss"])
    return figure


def _percentiles(result: TrainResult, narrow: bool) -> Figure:
    figure, axes = _figure(narrow, panels=len(result.curves))
    ends: dict[str, list[tuple[float, float, str, str]]] = {name: [] for name in result.curves}
    for panel, (name, curve) in zip(axes, result.curves.items(), strict=True):
        low, middle, high = zip(*curve.percentiles, strict=True)
        color = COLORS[name]
        panel.fill_between(curve.steps, low, high, color=color, alpha=0.18, lw=0)
        for values, style, text in ((high, ":", "85th"), (middle, "-", "50th"), (low, ":", "15th")):
            panel.plot(curve.steps, values, color=color, ls=style, lw=1.4)
            ends[name].append((curve.steps[-1], values[-1], text, color))
        panel.set_title(f"{_label(name, narrow)}: input to the activation", loc="left")
        panel.set_xlabel("training step")
    for panel, name in zip(axes, result.curves, strict=True):
        label_ends(panel, ends[name])
    return figure


def _label(name: str, narrow: bool) -> str:
    if narrow:
        return {"batch norm": "with", "baseline": "without"}[name]
    return {"batch norm": "with batch norm", "baseline": "without (baseline)"}[name]


def _mark_divergence(axes: Axes, curve: Curve, values: list[float], color: str) -> None:
    if curve.diverged_at is not None:
        axes.plot(curve.steps[-1], values[-1], "x", ms=9, mew=2, color=color)
        axes.annotate(
            f"diverged at step {curve.diverged_at:,}",
            (curve.steps[-1], values[-1]),
            xytext=(-8, 10),
            textcoords="offset points",
            ha="right",
            color=drawing.for_words(color),
        )
