"""The page to play with: its parts compute in JavaScript, from the numbers of `lab.playing`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from batchnorm.errors import InputError
from batchnorm.lab.playing import Playground
from batchnorm.report.pages import render, write_page


def write_play(path: str | Path, found: Playground) -> Path:
    """Write the page; it needs no other file and no network.

    Args:
        path: of the HTML file.
        found: what `batchnorm.lab.play` or `batchnorm.lab.lesson` returned.

    Returns:
        The path.

    Raises:
        InputError: the file cannot be written, or a number is not finite.
    """
    return write_page("play", path, render("play", found=found, notes=_notes(found), data=_data(found)))


def _data(found: Playground) -> dict[str, Any]:
    """What the scripts read, by the names that they have for it."""
    learn = dataclasses.asdict(found.learn)
    data = {
        "grid": dataclasses.asdict(found.grid),
        "layer": dataclasses.asdict(found.pool),
        "batches": found.batches,
        "fold": dataclasses.asdict(found.fold),
        "learn": {
            "x": learn["x"], "y": learn["y"], "testX": learn["test_x"], "testY": learn["test_y"],
            "classes": learn["classes"], "hidden": learn["hidden"],
        },
    }  # fmt: skip
    for part in ("grid", "layer", "batches", "fold"):
        if not _finite(data[part]):
            raise InputError(
                f"play: numbers of the {part} are not finite; the page has nothing to show. Look for the cause with "
                "bn.diagnose, or choose another layer or channel."
            )
    return data


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _notes(found: Playground) -> dict[str, str]:
    """A sentence for each part that says what its numbers are."""
    if not found.given:
        batches = "Here are 60 batches of 16 values; their own means differ a little more than chance makes them."
        return {"layer": "", "batches": batches, "fold": "", "learn": found.learn.text}
    fold = "No convolution or linear layer feeds this layer directly, so the numbers are a lesson’s."
    if found.folded is not None:
        fold = f"Here are the first weights of {found.folded}, a slice of its sum, and what {found.layer} keeps."
    return {
        "layer": "They are the first of the channel, taken as a pool of their own.",
        "batches": f"Here are {len(found.batches)} batches of channel {found.channel}, the network held still.",
        "fold": fold,
        "learn": found.learn.text,
    }
