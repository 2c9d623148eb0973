"""Procedure 2 of Ioffe & Szegedy (2015), end to end: networks, data, training, export."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batchnorm.training.config import TrainConfig as TrainConfig

# Loaded on first use: `batchnorm --help` shows the defaults of TrainConfig without loading torch.
_PUBLIC = {
    "Dataset": "batchnorm.training.datasets",
    "Interrupted": "batchnorm.training.loop",
    "TrainResult": "batchnorm.training.results",
    "Run": "batchnorm.training.runs",
    "load_data": "batchnorm.training.datasets",
    "load_run": "batchnorm.training.runs",
    "make_data": "batchnorm.training.datasets",
    "resume": "batchnorm.training.procedure2",
    "train": "batchnorm.training.procedure2",
}

__all__ = [*sorted(_PUBLIC), "TrainConfig"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'batchnorm.training' has no attribute {name!r}")


if TYPE_CHECKING:
    from batchnorm.training.datasets import Dataset as Dataset
    from batchnorm.training.datasets import load_data as load_data
    from batchnorm.training.datasets import make_data as make_data
    from batchnorm.training.loop import Interrupted as Interrupted
    from batchnorm.training.procedure2 import resume as resume
    from batchnorm.training.procedure2 import train as train
    from batchnorm.training.results import TrainResult as TrainResult
    from batchnorm.training.runs import Run as Run
    from batchnorm.training.runs import load_run as load_run
