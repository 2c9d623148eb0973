"""Findings as tables of text, and as values for JSON."""

from __future__ import annotations

import math
from typing import Any


def text_table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a table: the titles, a rule, and a line for each row; columns are as wide as their texts."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in table)
    head, *body = ("  ".join(cells).rstrip() for cells in padded)
    return [head, "-" * max(map(len, [head, *body])), *body]


def finite(value: Any) -> Any:
    """The same with None for floats that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
