"""The pictures of docs/pools.md: which values share statistics, as the layers themselves have it.

Nothing is drawn by hand. Each option's layer is differentiated: two values have one colour where moving one of them
moves the normalized other. The block is (batch, channel, time), as it lies in (N, C, L).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import batchnorm as bn

N, C, L = 4, 4, 6
LENGTHS = torch.tensor([6, 2, 5, 3])
OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]
PANELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("BatchNorm1d(C)\na channel", {}, {}),
    ("lengths=…, mask=…\nvalid values of a channel", {}, {"lengths": LENGTHS}),
    ("ghost_size=2\na channel of a ghost batch", {"ghost_size": 2}, {}),
    ("channel_groups=2\na group of channels", {"channel_groups": 2}, {}),
    ('pool="frame"\na channel at a time step', {"pool": "frame", "max_steps": L}, {}),
    (
        "channel_groups=2, ghost_size=2, lengths=…\nall of it",
        {"channel_groups": 2, "ghost_size": 2},
        {"lengths": LENGTHS},
    ),
]


def labels(options: dict[str, Any], call: dict[str, Any]) -> np.ndarray:
    """The number of each value's pool, (N, C, L); -1 for what is in none."""
    torch.manual_seed(0)
    layer = bn.BatchNorm1d(C, **options).double()

    def run(x: Tensor) -> Tensor:
        sequences = layer.pool is not None  # (batch, time, channels)
        y = layer(x.transpose(1, 2) if sequences else x, **call)
        return y.transpose(1, 2) if sequences else y

    x = torch.randn(N, C, L, dtype=torch.float64)
    moved = torch.autograd.functional.jacobian(run, x).reshape(x.numel(), x.numel()) != 0
    found = np.full(x.numel(), -1)
    for value in range(x.numel()):
        if found[value] < 0 and moved[value].any():
            found[moved[value].numpy()] = found.max() + 1
    return found.reshape(x.shape)


def draw(axes: Any, pools: np.ndarray, title: str, ink: str, empty: str) -> None:
    colours = np.full((*pools.shape, 4), mpl.colors.to_rgba(empty))
    for pool in range(pools.max() + 1):
        colours[pools == pool] = mpl.colors.to_rgba(OKABE_ITO[pool % len(OKABE_ITO)])
    block = colours.transpose(2, 0, 1, 3)  # time to the right, batch into depth, channels upward
    axes.voxels(np.ones(block.shape[:3]), facecolors=block, edgecolor=ink, linewidth=0.35, shade=False)
    axes.set_title(title, fontsize=10, color=ink, pad=0)
    axes.set_xlabel("time", color=ink, labelpad=-12)
    axes.set_ylabel("batch", color=ink, labelpad=-12)
    axes.set_zlabel("channel", color=ink, labelpad=-14)
    axes.set(xticks=[], yticks=[], zticks=[])
    axes.view_init(elev=24, azim=-58)
    axes.set_box_aspect((L, N, C), zoom=1.12)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(ink)


def main(folder: Path) -> None:
    found = [(title, labels(options, call)) for title, options, call in PANELS]
    for name, ink, paper, empty in (
        ("light", "#222222", "#ffffff", "#f2f2f2"),
        ("dark", "#dddddd", "#1e2129", "#2c313c"),
    ):
        figure, grid = plt.subplots(2, 3, figsize=(10.5, 7), subplot_kw={"projection": "3d"}, facecolor=paper)
        for axes, (title, pools) in zip(grid.flat, found, strict=True):
            axes.set_facecolor(paper)
            draw(axes, pools, title, ink, empty)
        figure.subplots_adjust(left=0.01, right=0.98, top=0.93, bottom=0.03, wspace=0.02, hspace=0.12)
        figure.savefig(folder / f"pools-{name}.png", dpi=110, facecolor=paper)
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "images")
