"""The lab: instruments for any network, and experiments that show what batch norm does.

Every experiment is a name here: ``batchnorm.lab.figure1(quick=True)`` runs it and returns a `Result`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Config": "batchnorm.lab.experiment",
    "Experiment": "batchnorm.lab.experiment",
    "Explanation": "batchnorm.lab.explanation",
    "Playground": "batchnorm.lab.playing",
    "Finding": "batchnorm.lab.results",
    "Result": "batchnorm.lab.results",
    "Trial": "batchnorm.lab.results",
    "explain": "batchnorm.lab.explanation",
    "lesson": "batchnorm.lab.playing",
    "play": "batchnorm.lab.playing",
    "run": "batchnorm.lab.runner",
    "run_all": "batchnorm.lab.runner",
}
_MODULES = ("experiments", "instruments", "theorems")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"batchnorm.lab.{name}")
    if not name.startswith("_"):
        found = importlib.import_module("batchnorm.lab.experiments").EXPERIMENTS.get(name)
        if found is not None:
            return found
    raise AttributeError(f"module 'batchnorm.lab' has no attribute {name!r}")


if TYPE_CHECKING:
    from batchnorm.lab import instruments as instruments
    from batchnorm.lab.experiment import Experiment as Experiment
    from batchnorm.lab.explanation import Explanation as Explanation
    from batchnorm.lab.explanation import explain as explain
    from batchnorm.lab.playing import Playground as Playground
    from batchnorm.lab.playing import lesson as lesson
    from batchnorm.lab.playing import play as play
    from batchnorm.lab.results import Finding as Finding
    from batchnorm.lab.results import Result as Result
    from batchnorm.lab.results import Trial as Trial
    from batchnorm.lab.runner import run as run
    from batchnorm.lab.runner import run_all as run_all
    from batchnorm.lab.settings import Config as Config
