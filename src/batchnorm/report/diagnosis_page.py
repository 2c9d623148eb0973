"""The page of a diagnosis: how far evaluation is from training, layer by layer, and what mends it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.diagnosis.findings import LayerGap
from batchnorm.diagnosis.gap import Diagnosis
from batchnorm.report import drawing
from batchnorm.report.drawing import COLORS
from batchnorm.report.pages import render, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 24  # on the axis of layers
MOST_LETTERS = 80  # that stand side by side there
NO_DROPOUT = 1e-3  # and less is rounding
ALTERNATIVE = "By layer: how far running statistics are off, and how far each layer alone moves the outputs."


def write_diagnosis(path: str | Path, found: Diagnosis, *, source: str = "") -> Path:
    """Write the page; it needs no other file and no network. Without matplotlib it has the tables alone.

    Args:
        path: of the HTML file.
        found: what `batchnorm.diagnose` returned.
        source: where network and batches come from, a sentence.

    Raises:
        InputError: the file cannot be written.
    """
    page = render(
        "diagnosis",
        found=found,
        source=source,
        figure=_figure(found),
        dropout=found.outcomes["training"].distance > NO_DROPOUT,
    )
    return write_page("diagnose", path, page)


def _figure(found: Diagnosis) -> str:
    if not drawing.available() or found.after is None:
        return ""
    with drawing.styled("layers"):
        svg = drawing.svg(_draw(found.layers))
    return drawing.for_page(svg, "layers", ALTERNATIVE)


def _draw(layers: tuple[LayerGap, ...]) -> Figure:
    """Means, standard deviations and effects, the layers from left to right in the order of the data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 6.6), layout="constrained")
    means, deviations, effects = figure.subplots(3, 1, sharex=True)
    places = list(range(len(layers)))
    means.bar(places, [2 * layer.noise for layer in layers], bottom=[-layer.noise for layer in layers], width=0.86,
              color=COLORS["gray"], alpha=0.3, label="noise of the batches’ own statistics")  # fmt: skip
    _dots(means, [(layer.mean_off, layer.arrives_mean_off) for layer in layers])
    _dots(deviations, [(layer.std_off, layer.arrives_std_off) for layer in layers])
    effects.bar(places, [_finite(layer.effect) for layer in layers], width=0.6, color=COLORS["purple"])
    means.set_title("running mean off by (standard deviations)", loc="left")
    deviations.set_title("running standard deviation off by (logarithm; 0.1 is about 10 %)", loc="left")
    effects.set_title("the layer’s running statistics alone move the outputs by (standard deviations)", loc="left")
    for axes in (means, deviations, effects):
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
    every = math.ceil(len(layers) / MOST_NAMES)
    names = [layer.name or "the network" for layer in layers[::every]]
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    effects.set_xticks(places[::every], names, **(slanted if sum(map(len, names)) > MOST_LETTERS else {}))
    handles, labels = means.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3)
    return figure


def _dots(axes: Axes, pairs: list[tuple[float | None, float | None]]) -> None:
    kept: dict[str, Any] = {"marker": "o", "ms": 7, "clip_on": False, "color": COLORS["batch norm"]}
    arriving: dict[str, Any] = {
        "marker": "^",
        "ms": 7,
        "clip_on": False,
        "color": COLORS["baseline"],
        "mfc": "none",
        "mew": 1.6,
    }
    for place, (own, arrives) in enumerate(pairs):
        first = place == 0
        axes.plot(
            place, _finite(arrives), ls="", label="from what arrives in evaluation" if first else None, **arriving
        )
        axes.plot(place, _finite(own), ls="", label="from the data’s statistics" if first else None, **kept)


def _finite(value: float | None) -> float:
    """Where there is something to draw."""
    return math.nan if value is None or not math.isfinite(value) else value
