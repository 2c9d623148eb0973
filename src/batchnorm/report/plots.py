"""Drawings of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.report import drawing
from batchnorm.report.drawing import COLORS as COLORS
from batchnorm.report.drawing import VARIABLES as VARIABLES
from batchnorm.report.drawing import available as available
from batchnorm.training.files import write_text
from batchnorm.training.results import Curve, TrainResult

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
    drawings: list[tuple[str, str, str, Callable[[TrainResult], Figure]]] = [
        (
            "accuracy",
            "Test accuracy over training",
            "Test accuracy in percent against training steps, with and without batch norm.",
            _accuracy,
        ),
        (
            "loss",
            "Loss over training",
            "Cross-entropy in nats against training steps, on training batches and test samples.",
            _loss,
        ),
        (
            "percentiles",
            "What one hidden unit's activation receives",
            "15th, 50th and 85th percentile of one unit's input to its activation over training.",
            _percentiles,
        ),
    ]
    folder.mkdir(exist_ok=True)
    plots = []
    for name, title, alternative, draw_one in drawings:
        with drawing.styled(name):
            figure = draw_one(result)
            svg = drawing.svg(figure)
            drawing.save_png(figure, folder / f"{name}.png")
        write_text(folder / f"{name}.svg", svg)
        plots.append(Plot(name, title, alternative, drawing.for_page(svg, name, alternative)))
    return plots


def _figure(width: float = 7.2, height: float = 3.6, panels: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, sharey=True, sharex=True, squeeze=False)[0]


def _accuracy(result: TrainResult) -> Figure:
    figure, (axes,) = _figure()
    baseline = result.curves.get("baseline")
    for name, curve in result.curves.items():
        values = [100 * value for value in curve.test_accuracy]
        axes.plot(curve.steps, values, color=COLORS[name], ls=DASHES[name], label=_label(name))
        _mark_divergence(axes, curve, values, COLORS[name])
    if baseline is not None:
        best = baseline.best_accuracy
        axes.axhline(100 * best, color=COLORS["text"], lw=0.8, ls=":")
        for name, curve in result.curves.items():
            step = curve.first_step_at(best)
            if step is not None:
                axes.plot(step, 100 * best, "o", ms=7, color=COLORS[name], clip_on=False, zorder=5)
                side = "left" if step < 0.8 * max(curve.steps) else "right"
                axes.annotate(
                    f"step {step:,}",
                    (step, 100 * best),
                    xytext=(6 if side == "left" else -6, -14),
                    textcoords="offset points",
                    ha=side,
                    color=COLORS[name],
                )
    axes.set(xlabel="training step", ylabel="test accuracy (%)", ylim=(None, 101))
    axes.legend(loc="lower right")
    return figure


def _loss(result: TrainResult) -> Figure:
    figure, axes = _figure(panels=2)
    for panel, (title, field) in zip(
        axes, (("training batches", "train_loss"), ("test samples", "test_loss")), strict=True
    ):
        for name, curve in result.curves.items():
            values = [float("nan") if v is None else v for v in getattr(curve, field)]
            panel.plot(curve.steps, values, color=COLORS[name], ls=DASHES[name], label=_label(name))
        panel.set(title=title, xlabel="training step", yscale="log")
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[0].legend(loc="lower left")
    return figure


def _percentiles(result: TrainResult) -> Figure:
    figure, axes = _figure(panels=len(result.curves))
    for panel, (name, curve) in zip(axes, result.curves.items(), strict=True):
        low, middle, high = zip(*curve.percentiles, strict=True)
        color = COLORS[name]
        panel.fill_between(curve.steps, low, high, color=color, alpha=0.18, lw=0)
        for values, style, text in ((high, ":", "85th"), (middle, "-", "50th"), (low, ":", "15th")):
            panel.plot(curve.steps, values, color=color, ls=style, lw=1.4)
            panel.annotate(
                text,
                (curve.steps[-1], values[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=color,
                annotation_clip=False,
            )
        panel.set(title=_label(name), xlabel="training step")
    axes[0].set_ylabel("input to the activation")
    return figure


def _label(name: str) -> str:
    return {"batch norm": "with batch norm", "baseline": "without (baseline)"}[name]


def _mark_divergence(axes: Axes, curve: Curve, values: list[float], color: str) -> None:
    if curve.diverged_at is not None:
        axes.plot(curve.steps[-1], values[-1], "x", ms=9, mew=2, color=color)
        axes.annotate(
            f"diverged at step {curve.diverged_at:,}",
            (curve.steps[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
        )
