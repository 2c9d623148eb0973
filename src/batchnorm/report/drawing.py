"""How every figure is drawn: one colour for one thing, readable in light, dark and without colour.

A figure is drawn on a transparent ground. As a file it has fixed colours; inside a page its colours become CSS
variables, so that one drawing serves the light and the dark page. A page holds each figure twice, for a wide screen and
for a phone, so that its text is about as large as the page's on both.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from batchnorm.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; lines differ in their dashes too. Words of a colour are
# darker than its lines: 4.5 to 1 against their ground, as WCAG 2.2 asks.
COLORS = {
    "batch norm": "#0072b2",
    "baseline": "#d55e00",
    "green": "#009e73",
    "purple": "#b0568a",
    "sky": "#3a9fd6",
    "orange": "#c98a00",
    "gray": "#7a7a7a",
    "text": "#333333",
    "grid": "#d9d9d9",
    "baseline text": "#b05107",
    "green text": "#077e5f",
    "purple text": "#a15080",
    "sky text": "#2f7297",
    "orange text": "#8c650c",
    "gray text": "#6c6c6d",
}
# The same on a dark ground; templates/style.css has both.
DARK = {
    "batch norm": "#56b4e9",
    "baseline": "#f0a04b",
    "green": "#2fc79b",
    "purple": "#dd93bd",
    "sky": "#a8d8f5",
    "orange": "#e6c04b",
    "gray": "#a3a3a3",
    "text": "#c3c9cf",
    "grid": "#363c42",
    "baseline text": "#f0a04b",
    "green text": "#2fc79b",
    "purple text": "#dd93bd",
    "sky text": "#a8d8f5",
    "orange text": "#e6c04b",
    "gray text": "#a3a3a3",
}
VARIABLES = {
    "batch norm": "--batch-norm",
    "baseline": "--baseline",
    "green": "--green",
    "purple": "--purple",
    "sky": "--sky",
    "orange": "--orange",
    "gray": "--gray",
    "text": "--figure-text",
    "grid": "--rule",
    "baseline text": "--baseline-text",
    "green text": "--green-text",
    "purple text": "--purple-text",
    "sky text": "--sky-text",
    "orange text": "--orange-text",
    "gray text": "--gray-text",
}

WIDE = 8.8  # inches, of every figure on a wide screen: its text is then a little smaller than the page's
FONT_SIZE = 11
NARROW = 4.0  # of the same figure on a phone, its panels below each other

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "axes.edgecolor": COLORS["grid"],
    "axes.labelcolor": COLORS["text"],
    "axes.titlecolor": COLORS["text"],
    "axes.titlesize": FONT_SIZE,
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
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def for_words(color: str) -> str:
    """The colour that names a line of `color`."""
    role = next((role for role, value in COLORS.items() if value == color), "")
    return COLORS.get(f"{role} text", color)


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def styled(name: str) -> Iterator[None]:
    """The style of all figures; the same drawing of the same `name` gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def svg(figure: Figure) -> str:
    """The figure as an SVG file with fixed colours, on a transparent ground."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a PNG file, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    write_bytes(path, buffer.getvalue())


def dark(svg: str) -> str:
    """The same file for a dark ground."""
    for role, color in COLORS.items():
        svg = svg.replace(color, DARK[role])
    return svg


def both(name: str, alternative: str, draw: Callable[[bool], Figure]) -> str:
    """The figure twice, for a wide screen and for a phone; `draw(narrow)` makes it, and the page's style shows one."""
    with styled(name):
        wide = svg(draw(False))
    return with_narrow(name, alternative, wide, draw)


def with_narrow(name: str, alternative: str, wide: str, draw: Callable[[bool], Figure]) -> str:
    """As `both`, of a figure whose drawing for a wide screen is there."""
    own = f"{name}-narrow"
    with styled(own):
        narrow = svg(draw(True))
    return (
        f'<div class="on-wide">{for_page(wide, name, alternative)}</div>'
        f'<div class="on-narrow">{for_page(narrow, own, alternative)}</div>'
    )


def for_page(svg: str, name: str, alternative: str) -> str:
    """The <svg> element alone, scalable, named for screen readers, its ids its own, its colours variables of the
    page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' (d|x|y|points)="[^"]*"', _shortened, svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alternative)}"', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for role, color in COLORS.items():
        svg = svg.replace(color, f"var({VARIABLES[role]})")
    return svg


def _shortened(attribute: re.Match[str]) -> str:
    """Places to a hundredth of a point; nobody sees the rest."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0])
