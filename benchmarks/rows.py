"""Rows: one figure of one contestant, as JSON; ratios and targets."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .targets import judge
from .timing import Phases

Row = dict[str, Any]
BASELINES = ("torch", "compile")
"""Contestants that the others are compared with: `x_torch` is how many times as fast as torch."""
REPEATED = ("kernel", "wall")
"""Suites that are run more than once, since memory decides much of a single run."""
CASE = ("shape", "dtype", "order", "fusion")
"""Columns that tell their cases apart, beside whether it is inference."""


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


def refusal(name: str, error: float, torchs: float, dtype: torch.dtype) -> str | None:
    """Why a contestant has no figure: its gradients are further from float64 than torch's (times 1.5)."""
    if error <= 1.5 * torchs + torch.finfo(dtype).eps:
        return None
    return f"{name}: gradients are off by {error:.3g}, torch's by {torchs:.3g}, no figure"


def settled(rows: Iterable[Row]) -> list[Row]:
    """The rows, of cases that were run several times those of one run: the one in the middle, by how many times as fast
    as torch our contestants are (geometric mean), or of two the slower. Rows of one run have one date."""
    cases: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        repeated = row["suite"] in REPEATED
        case = [row["suite"]]
        if repeated:
            case += [*(row.get(column) for column in CASE), row.get("direction") == "inference"]
        cases.setdefault(json.dumps(case), {}).setdefault(row["date"] if repeated else "", []).append(row)
    runs = [sorted(case.values(), key=_speed)[(len(case) - 1) // 2] for case in cases.values()]
    return [row for run in runs for row in run]


def _speed(run: Sequence[Row]) -> float:
    ratios = [row["x_torch"] for row in run if "x_torch" in row and row["contestant"] not in BASELINES]
    return statistics.fmean(map(math.log, ratios)) if ratios else 0.0


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
