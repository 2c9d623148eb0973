"""Rows: one figure of one contestant, as JSON; ratios and targets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .targets import judge
from .timing import Phases

Row = dict[str, Any]
BASELINES = ("torch", "compile")
"""Contestants that the others are compared with: `x_torch` is how many times as fast as torch."""


def compare(
    columns: Row, times: Mapping[str, Phases], errors: Mapping[str, float], limit: str | None = None
) -> list[Row]:
    """A row for each contestant and phase.

    Args:
        columns: what the rows share; a phase becomes the column `direction`.
        times: seconds, by contestant and phase.
        errors: in units of the last place, by contestant; those without one have nothing to get wrong.
        limit: the contestant that moves the bytes and computes nothing; `x_limit` is how many times its time.
    """
    rows = []
    for name, phases in times.items():
        for phase, seconds in phases.items():
            row = {**columns, "direction": phase, "contestant": name, "ms": seconds * 1e3}
            if name in errors:
                row["error"] = errors[name]
            if limit and name != limit:
                row |= {"limit": limit, "x_limit": seconds / times[limit][phase]}
            for baseline in BASELINES:
                if baseline in times and name not in (baseline, limit):
                    row[f"x_{baseline}"] = times[baseline][phase] / seconds
            rows.append({**row, "targets": judge(row)})
    return rows


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of JSON-lines files; a line that an interruption has cut off is left out."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
