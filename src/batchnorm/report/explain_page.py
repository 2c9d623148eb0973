"""The page that walks a mini-batch through a layer, with the numbers of `lab.explanation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.lab.explanation import Explanation, highlighted
from batchnorm.report import drawing
from batchnorm.report.drawing import COLORS
from batchnorm.report.pages import number, render, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 8  # values in the tables
AGREES = 1e-3  # of the largest value: rounding in 16 bits is less
FOLLOWED = (("smallest", "batch norm", "v"), ("middle", "green", "o"), ("largest", "baseline", "^"))
FORWARD = {"before: x": "x", "minus the mean": "centered", "normalized": "xhat", "scaled and shifted: y": "y"}
BACKWARD = {
    "arrives: dy": "dy",
    "minus its mean": "without_mean",
    "minus its part along the normalized x": "without_both",
    "leaves: dx": "dx",
}


@dataclass(frozen=True)
class Row:
    """One value of the pool through all steps, as text."""

    label: str
    kind: str
    forward: list[str]
    backward: list[str]


def write_explanation(path: str | Path, found: Explanation, *, source: str = "") -> Path:
    """Write the page; it needs no other file and no network.

    Args:
        path: of the HTML file.
        found: what `batchnorm.lab.explain` returned.
        source: where network and batch come from, a sentence.

    Raises:
        InputError: the file cannot be written.
    """
    rows = _rows(found)
    page = render(
        "explain",
        title=f"A mini-batch through {found.layer}",
        found=found,
        source=source,
        forward_rows=[[_called(row), *row.forward] for row in rows],
        backward_rows=[[_called(row), *row.backward] for row in rows],
        kinds=[row.kind for row in rows],
        agrees=lambda gap: "good" if gap < AGREES else "bad",
        rest=max(0, found.m - SHOWN),
        forward=_figure("forward", found, FORWARD),
        backward=_figure("backward", found, BACKWARD),
    )
    return write_page("explain", path, page)


def _called(row: Row) -> str:
    return f"{row.label} ({row.kind})" if row.kind else row.label


def _rows(found: Explanation) -> list[Row]:
    """The followed values and the first of the others."""
    followed = highlighted(found.x)
    places = [*followed, *(i for i in range(found.m) if i not in followed)][:SHOWN]
    forward, backward = ([getattr(found, step) for step in steps.values()] for steps in (FORWARD, BACKWARD))
    rows = []
    for number_, i in enumerate(places):
        kind = FOLLOWED[number_][0] if number_ < len(FOLLOWED) else ""
        rows.append(Row(f"value {i}", kind, [number(v[i]) for v in forward], [number(v[i]) for v in backward]))
    return rows


def _figure(name: str, found: Explanation, steps: dict[str, str]) -> str:
    if not drawing.available():
        return ""
    values = [getattr(found, step) for step in steps.values()]
    alternative = f"The values of the pool, {name}: {', '.join(steps)}"
    return drawing.both(name, alternative, lambda narrow: _lines(found, list(steps), values, narrow))


def _lines(found: Explanation, labels: Sequence[str], steps: Sequence[Sequence[float]], narrow: bool) -> Figure:
    """A row for each step, from the top down; a line follows each value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(drawing.NARROW if narrow else drawing.WIDE, 5.2 if narrow else 4.6), layout="constrained")
    axes: Any = figure.subplots(len(steps), 1)
    followed = dict(zip(highlighted(found.x), FOLLOWED, strict=False))
    for row, (label, values, place) in enumerate(zip(labels, steps, axes, strict=True)):
        others = [v for i, v in enumerate(values) if i not in followed]
        place.plot(others, [0.0] * len(others), "|", ms=16, mew=1.1, alpha=0.55, color=COLORS["gray"])
        for i, (name, color, marker) in followed.items():
            text = name if row == 0 else None
            place.plot(values[i], 0, marker, ms=10, color=COLORS[color], label=text, clip_on=False, zorder=5)
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        place.plot([mean - std, mean + std], [-0.62, -0.62], color=COLORS["purple"], lw=2.4, solid_capstyle="butt",
                   label="mean ± standard deviation" if row == 0 else None)  # fmt: skip
        place.plot(mean, -0.62, "D", ms=5, color=COLORS["purple"])
        place.set(ylim=(-1, 0.75), yticks=[])
        place.locator_params(axis="x", nbins=4 if narrow else 8)  # small numbers are long
        place.set_title(label, loc="left", pad=2)
        place.spines["left"].set_visible(False)
        place.grid(visible=False, axis="y")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if narrow else 4)
    return figure
