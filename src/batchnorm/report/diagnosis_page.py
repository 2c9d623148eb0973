"""The page of a diagnosis: how far evaluation is from training, layer by layer, and what mends it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.diagnosis.findings import LayerGap
from batchnorm.diagnosis.gap import Diagnosis
from batchnorm.report import drawing
from batchnorm.report.drawing import COLORS
from batchnorm.report.pages import as_name, render, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 24  # on the axis of layers
MOST_LETTERS = 80  # that stand side by side there
LONGEST = 22  # letters of a name there
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
        kind={True: "good", False: "bad", None: ""}[found.follows],
        source=source,
        figure=_figure(found),
        outcomes=_Rows.of(found.outcome_rows(), _caption(found)),
        layers=_Rows.of([{**row, "layer": as_name(row["layer"])} for row in found.layer_rows()]),
    )
    return write_page("diagnose", path, page)


@dataclass(frozen=True)
class _Rows:
    """A table: its titles and its cells."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""

    @classmethod
    def of(cls, rows: list[dict[str, str]], caption: str = "") -> _Rows:
        return cls(list(rows[0]) if rows else [], [list(row.values()) for row in rows], caption)


def _caption(found: Diagnosis) -> str:
    text = (
        "Distance: root mean square difference from the outputs of “training without dropout”, in standard deviations "
        "of these outputs over the samples."
    )
    if found.after is not None:
        text += " “Calibrated”: after bn.calibrate on these batches."
    if found.outcomes["training"].distance > NO_DROPOUT:
        text += " Dropout, not batch norm, makes the distance between “training” and “training without dropout”."
    return text


def _figure(found: Diagnosis) -> str:
    if not drawing.available() or found.after is None:
        return ""
    return drawing.both("layers", ALTERNATIVE, lambda narrow: _draw(found.layers, narrow))


def _draw(layers: tuple[LayerGap, ...], narrow: bool) -> Figure:
    """Means, standard deviations and effects, the layers from left to right in the order of the data."""
    from matplotlib.figure import Figure

    most = MOST_NAMES // 3 if narrow else MOST_NAMES
    figure = Figure(figsize=(drawing.NARROW if narrow else drawing.WIDE, 6.8), layout="constrained")
    means, deviations, effects = figure.subplots(3, 1, sharex=True)
    places = list(range(len(layers)))
    means.bar(places, [2 * layer.noise for layer in layers], bottom=[-layer.noise for layer in layers], width=0.86,
              color=COLORS["gray"], alpha=0.3, label="noise of batches")  # fmt: skip
    _dots(means, [(layer.mean_off, layer.arrives_mean_off) for layer in layers])
    _dots(deviations, [(layer.std_off, layer.arrives_std_off) for layer in layers])
    effects.bar(places, [_finite(layer.effect) for layer in layers], width=0.6, color=COLORS["purple"])
    gap = "\n" if narrow else " "
    means.set_title(f"running mean off by{gap}(standard deviations)", loc="left")
    deviations.set_title(f"running standard deviation off by{gap}(logarithm; 0.1 is about 10 %)", loc="left")
    effects.set_title(f"the layer’s running statistics alone move{gap}the outputs by (standard deviations)", loc="left")
    for axes in (means, deviations, effects):
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.6, max(len(layers) - 0.4, 1.6))
        axes.grid(visible=False, axis="x")
    every = math.ceil(len(layers) / most)
    names = short_names([layer.name or "the network" for layer in layers])[::every]
    letters = len(names) * (max(map(len, names)) + 1)
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    effects.set_xticks(
        places[::every],
        names,
        **(slanted if letters > (MOST_LETTERS // 3 if narrow else MOST_LETTERS) else {}),
    )
    handles, labels = means.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1 if narrow else 3, columnspacing=1.4)
    return figure


def short_names(names: list[str]) -> list[str]:
    """Names that fit below an axis: long ones without what all have in front and behind, then their last letters."""
    if max(map(len, names)) > LONGEST and len(set(names)) > 1:
        parts = [name.split(".") for name in names]
        first = _same(parts)
        last = _same([part[first:][::-1] for part in parts])
        names = [".".join(part[first : len(part) - last]) or name for part, name in zip(parts, names, strict=True)]
    return [name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in names]


def _same(parts: list[list[str]]) -> int:
    """In how many of their first places all are the same."""
    return sum(1 for _ in itertools.takewhile(lambda place: len(set(place)) == 1, zip(*parts, strict=False)))


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
