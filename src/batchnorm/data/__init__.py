"""Moments where the data is: files larger than memory, tables, and data sets of Ray, Spark and Dask."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use, engines above all.
_PUBLIC = {
    "ColumnMoments": "batchnorm.data.columns",
    "MomentsOf": "batchnorm.data.on_ray",
    "batches": "batchnorm.data.reading",
    "moments": "batchnorm.data.measuring",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'batchnorm.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))


if TYPE_CHECKING:
    from batchnorm.data.columns import ColumnMoments as ColumnMoments
    from batchnorm.data.measuring import moments as moments
    from batchnorm.data.on_ray import MomentsOf as MomentsOf
    from batchnorm.data.reading import batches as batches
