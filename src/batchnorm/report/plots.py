"""Drawings of a training run: one colour for one thing, readable in light, dark and without colour.

Each figure is drawn once, on a transparent ground. As a file it has fixed colours; inside the page
its colours become CSS variables, so that one drawing serves the light and the dark page.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.training.files import write_atomically, write_text
from batchnorm.training.results import Curve, TrainResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; lines differ in their dashes too.
COLORS = {"batch norm": "#0072b2", "baseline": "#d55e00", "text": "#333333", "grid": "#d9d9d9"}
VARIABLES = {
    "batch norm": "--batch-norm",
    "baseline": "--baseline",
    "text": "--figure-text",
    "grid": "--rule",
}
DASHES: dict[str, Any] = {"batch norm": "-", "baseline": (0, (5, 2))}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": COLORS["grid"],
    "axes.labelcolor": COLORS["text"],
    "axes.titlecolor": COLORS["text"],
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.6,
    "text.color": COLORS["text"],
    "xtick.color": COLORS["text"],
    "ytick.color": COLORS["text"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A drawing: `svg` with CSS variables for the page, and a sentence for who cannot see it."""

    name: str
    title: str
    alternative: str
    svg: str


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: TrainResult, folder: Path) -> list[Plot]:
    """Draw a run's figures; writes NAME.svg and NAME.png into `folder` and returns the page's."""
    import matplotlib

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
    for name, title, alternative, drawing in drawings:
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = drawing(result)
            svg = _svg(figure)
            _save_png(figure, folder / f"{name}.png")
        write_text(folder / f"{name}.svg", svg)
        plots.append(Plot(name, title, alternative, _for_page(svg, name, alternative)))
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


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _save_png(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160, facecolor="white"))


def _for_page(svg: str, name: str, alternative: str) -> str:
    """The <svg> element alone, scalable, named for screen readers, its ids its own, its colours
    variables of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{alternative}"', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for role, color in COLORS.items():
        svg = svg.replace(color, f"var({VARIABLES[role]})")
    return svg
