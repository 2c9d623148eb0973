"""docs/performance.md: its generated tables, and its plots."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import Row
from .tables import (
    ACTIVATION_BLOCKS,
    ALONE_BLOCKS,
    BLOCKS,
    COMPILED_BLOCKS,
    DEPTHWISE_BLOCKS,
    GPU_BLOCKS,
    LAYER_BLOCKS,
    LIMITS,
    NETWORK_BLOCKS,
    ORDER_BLOCKS,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; one colour for one contestant, on every plot.
COLORS = {
    "torch": "#d55e00", "ours": "#0072b2", "ours fused": "#009e73", "compile": "#cc79a7", "jax": "#e69f00",
    "copy": "#808080", "add": "#808080",
}  # fmt: skip
MARKERS = {"torch": "o", "ours": "s", "ours fused": "D", "compile": "^", "jax": "v"}
NEUTRAL = "#808080"  # for text and rules: readable on white and on black
APART = {
    "networks": NETWORK_BLOCKS, "alone": ALONE_BLOCKS, "activations": ACTIVATION_BLOCKS, "layers": LAYER_BLOCKS,
    "compiled": COMPILED_BLOCKS, "orders": ORDER_BLOCKS, "depthwise": DEPTHWISE_BLOCKS,
}  # fmt: skip
"""Whose rows lie in folders of their own, by the folders' names."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.edgecolor": NEUTRAL, "axes.labelcolor": NEUTRAL, "axes.titlecolor": NEUTRAL, "axes.titlesize": 10,
    "grid.color": NEUTRAL, "grid.alpha": 0.25, "grid.linewidth": 0.6, "text.color": NEUTRAL, "xtick.color": NEUTRAL,
    "ytick.color": NEUTRAL, "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip


def write_page(rows: Sequence[Row], docs: Path) -> list[Path]:
    """Puts tables between the page's markers, and plots into docs/performance/; returns the files written."""
    page = docs / "performance.md"
    page.write_text(fill(page.read_text(), rows))
    return [page, *draw(rows, docs / "performance")]


def write_apart(kind: str, rows: Sequence[Row], docs: Path) -> Path:
    """Puts the tables of one kind of rows, one of `APART`, between their markers."""
    page = docs / "performance.md"
    page.write_text(fill(page.read_text(), rows, APART[kind]))
    return page


def write_gpu_page(rows: Sequence[Row], docs: Path) -> Path:
    """Puts the tables of the GPU between the markers of its page."""
    page = docs / "gpu.md"
    page.write_text(fill(page.read_text(), rows, GPU_BLOCKS))
    return page


def fill(text: str, rows: Sequence[Row], blocks: Mapping[str, Callable[[Sequence[Row]], str]] = BLOCKS) -> str:
    """The page with what is between `<!-- NAME -->` and `<!-- end -->` made anew.

    Raises:
        ValueError: a block is missing in the page, which would go stale unseen.
    """
    for name, block in blocks.items():
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        made = f"<!-- {name} -->\n{block(rows)}\n<!-- end -->"
        text, found = re.subn(pattern, made.replace("\\", r"\\"), text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the page has {found} blocks {name!r}, expected one")
    return text


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The plots of what there are rows of, as SVG."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figures = [row for row in rows if "absent" not in row]
    for name, drawing in DRAWINGS.items():
        with matplotlib.rc_context(STYLE):
            figure = drawing(figures)
            if figure is None:
                continue
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        path = folder / f"{name}.svg"
        path.write_text(re.sub(r"[ \t]+\n", "\n", buffer.getvalue()))
        written.append(path)
    return written


def _figure(height: float, panels: int, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def _label(row: Row) -> str:
    short = {"float32": "f32", "bfloat16": "bf16", "channels_last": "last", "planar": "planar", "dense": ""}
    return f"{','.join(map(str, row['shape']))} {short[row['dtype']]} {short[row['order']]}".strip()


def _dots(axes: Axes, rows: Sequence[Row], labels: Sequence[str], value: Callable[[Row], float]) -> None:
    """One line of the plot for each label, one dot for each contestant."""
    for name in dict.fromkeys(r["contestant"] for r in rows):
        own = [r for r in rows if r["contestant"] == name]
        axes.plot(
            [value(r) for r in own], [labels.index(_label(r)) for r in own], MARKERS[name], color=COLORS[name],
            label=name,
        )  # fmt: skip
    axes.axvline(1, color=NEUTRAL, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _panels(rows: Sequence[Row], titles: dict[str, str], column: str, value: Callable[[Row], float], axis: str) -> Any:
    """A panel of dots for each value of a column; None where there are no rows."""
    if not rows:
        return None
    labels = list(dict.fromkeys(map(_label, rows)))
    there = [key for key in titles if any(r[column] == key for r in rows)]
    figure, panels = _figure(1.3 + 0.22 * len(labels), len(there), sharex=True, sharey=True)
    for axes, key in zip(panels, there, strict=True):
        _dots(axes, [r for r in rows if r[column] == key], labels, value)
        axes.set_title(titles[key])
    figure.supxlabel(axis, fontsize="medium")
    _legend(figure, panels)
    return figure


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        if not label.startswith("_")
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=6)


def _limits(rows: Sequence[Row]) -> Figure | None:
    found = [r for r in rows if r["suite"] == "kernel" and r["contestant"] not in LIMITS]
    titles = {"forward": "forward / copy", "backward": "backward / add", "inference": "inference with ReLU / copy"}
    return _panels(found, titles, "direction", lambda r: r["x_limit"], "times the limit; left is better")


def _speedups(rows: Sequence[Row]) -> Figure | None:
    found = [r for r in rows if r["suite"] == "wall" and r["direction"] == "forward+backward" and "x_torch" in r]
    titles = {"bn": "BN", "bn+relu": "BN + ReLU", "bn+add+relu": "BN + add + ReLU"}
    return _panels(found, titles, "fusion", lambda r: r["x_torch"], "times as fast as torch; right is better")


def _growth(rows: Sequence[Row]) -> Figure | None:
    found = [r for r in rows if r["suite"] == "growth"]
    if not found:
        return None
    there = [axis for axis in ("N", "C", "space") if any(r["axis"] == axis for r in found)]
    figure, panels = _figure(3.4, len(there), sharey=True)
    for axes, axis in zip(panels, there, strict=True):
        at = {"N": 0, "C": 1, "space": 2}[axis]
        keys = dict.fromkeys((r["contestant"], r["threads"]) for r in found)
        for name, threads in keys:
            own = [
                r for r in found if (r["axis"], r["contestant"], r["threads"]) == (axis, name, threads)
            ]  # fmt: skip
            axes.plot(
                [r["shape"][at] for r in own], [r["ms"] for r in own], MARKERS[name], color=COLORS[name],
                linestyle="--" if threads == 1 else "-", label=f"{name}, {threads} thread{'s' * (threads > 1)}",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="height and width" if axis == "space" else axis)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("ms, BN + ReLU forward + backward")
    _legend(figure, panels)
    return figure


def _bars(
    axes: Axes, rows: Sequence[Row], label: Callable[[Row], str], value: Callable[[Row], float], lying: bool = False
) -> None:
    """Groups of bars, one colour for each contestant; lying ones from the top down, for long labels."""
    groups, names = (
        list(dict.fromkeys(each))
        for each in ((label(r) for r in rows), (r["contestant"] for r in rows))
    )  # fmt: skip
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        own = [r for r in rows if r["contestant"] == name]
        places = [groups.index(label(r)) + (i - (len(names) - 1) / 2) * width for r in own]
        draw = axes.barh if lying else axes.bar
        draw(places, [value(r) for r in own], width * 0.9, color=COLORS[name], label=name)
    if lying:
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
    else:
        axes.set_xticks(range(len(groups)), groups)
    (axes.axvline if lying else axes.axhline)(1, color=NEUTRAL, linewidth=1.2)
    axes.grid(axis="y" if lying else "x", visible=False)


def _steps(rows: Sequence[Row]) -> Figure | None:
    found = [r for r in rows if r["suite"] in ("step", "memory")]
    if not found:
        return None
    figure, panels = _figure(3.6, 2)

    def label(r: Row) -> str:
        return f"{r['network']}\n{r['dtype']}"

    _bars(panels[0], [r for r in found if r["suite"] == "step"], label, lambda r: r.get("x_torch", 1.0))
    _bars(panels[1], [r for r in found if r["suite"] == "memory"], label, lambda r: r["of_torch"])
    panels[0].set_title("training step: times as fast as torch (higher is better)")
    panels[1].set_title("peak memory of a step / torch's (lower is better)")
    for axes in panels:
        axes.tick_params(axis="x", labelsize=8)
    _legend(figure, panels)
    return figure


def _peers(rows: Sequence[Row]) -> Figure | None:
    found = [
        r for r in rows if r["suite"] in ("allocator", "peers") and r["direction"] == "forward+backward"
    ]  # fmt: skip
    suites = [suite for suite in ("allocator", "peers") if any(r["suite"] == suite for r in found)]
    if not suites:
        return None
    figure, panels = _figure(6.4, len(suites))

    def label(r: Row) -> str:
        return f"{r['allocator']}, {_label(r)}" if "allocator" in r else _label(r)

    for axes, suite in zip(panels, suites, strict=True):
        _bars(axes, [r for r in found if r["suite"] == suite], label, lambda r: r.get("x_torch", 1.0), lying=True)
        axes.set_title({"allocator": "by allocator", "peers": "beside JAX"}[suite])
        axes.set_xlabel("times as fast as torch there")
        axes.tick_params(axis="y", labelsize=7)
    _legend(figure, panels)
    return figure


DRAWINGS: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "limit": _limits, "speedup": _speedups, "growth": _growth, "steps": _steps, "peers": _peers,
}  # fmt: skip
"""The plots, by file name."""
