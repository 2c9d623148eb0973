"""The picture of README and gallery: outputs in evaluation against outputs in training, before and after the repair.

    python docs/scripts/diagnose_picture.py [FOLDER]

The network is that of examples/diagnose_broken.py; a point is the logit of a test sample's
own class.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import batchnorm as bn
from batchnorm.report import drawing
from batchnorm.report.drawing import COLORS

ROOT = Path(__file__).parents[2]


def measured() -> list[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """(title, logits in training, logits in evaluation, accuracy) before and after."""
    example = runpy.run_path(str(ROOT / "examples" / "diagnose_broken.py"))
    x, y = example["digits"]()
    net = example["broken"](x, y)
    found = []
    for title in ("before", "after bn.calibrate"):
        with torch.no_grad(), bn.no_update(net):
            trained, evaluated = net.train()(x[1500:]), net.eval()(x[1500:])
        right = float((evaluated.argmax(1) == y[1500:]).float().mean())
        own = [logits.gather(1, y[1500:, None]).flatten() for logits in (trained, evaluated)]
        found.append((f"{title}: {100 * right:.0f} % right", *own, right))
        bn.calibrate(net, list(x[:1500].split(60)))
    return found


def main(folder: Path) -> None:
    with drawing.styled("diagnose"):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        for axes, (title, trained, evaluated, _), color in zip(
            figure.subplots(1, 2, sharex=True), measured(), ("baseline", "batch norm"), strict=True
        ):
            low, high = float(trained.min()), float(trained.max())
            axes.plot([low, high], [low, high], color=COLORS["gray"], lw=1)
            axes.plot(trained, evaluated, ".", ms=4, color=COLORS[color])
            axes.set(xlabel="logit in training mode", ylabel="logit in evaluation mode")
            axes.set_title(title, loc="left")
        svg = drawing.svg(figure)
    (folder / "diagnose-light.svg").write_text(svg, encoding="utf-8")
    (folder / "diagnose-dark.svg").write_text(drawing.dark(svg), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
