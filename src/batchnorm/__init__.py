"""Batch normalization as a system: exact, fused, and for a network's whole life."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Names of the public face, and the module that each comes from. Loaded on first use, so that
# `import batchnorm` costs little more than `import torch`.
_PUBLIC = {
    "BatchNorm": "batchnorm.nn.batch_norm",
    "BatchNorm1d": "batchnorm.nn.batch_norm",
    "BatchNorm2d": "batchnorm.nn.batch_norm",
    "BatchNorm3d": "batchnorm.nn.batch_norm",
    "BatchNormError": "batchnorm.errors",
    "GRU": "batchnorm.nn.recurrent",
    "GRUCell": "batchnorm.nn.recurrent",
    "LSTM": "batchnorm.nn.recurrent",
    "LSTMCell": "batchnorm.nn.recurrent",
    "Moments": "batchnorm.moments",
    "RNN": "batchnorm.nn.recurrent",
    "RNNCell": "batchnorm.nn.recurrent",
    "Renorm": "batchnorm.sources",
    "Standardize": "batchnorm.nn.standardization",
    "StepBatchNorm": "batchnorm.nn.step_batch_norm",
    "accelerate": "batchnorm.surgery.acceleration",
    "accumulate": "batchnorm.nn.modes",
    "accumulate_exact": "batchnorm.nn.accumulation",
    "adapt": "batchnorm.population.adaptation",
    "average_statistics": "batchnorm.population.averaging",
    "calibrate": "batchnorm.population.calibration",
    "convert": "batchnorm.surgery.conversion",
    "diagnose": "batchnorm.diagnosis.gap",
    "fold": "batchnorm.surgery.folding",
    "freeze": "batchnorm.surgery.freezing",
    "insert": "batchnorm.surgery.insertion",
    "joinable": "batchnorm.nn.joining",
    "load_flax": "batchnorm.population.checkpoints",
    "load_keras": "batchnorm.population.checkpoints",
    "load_run": "batchnorm.training.runs",
    "load_statistics": "batchnorm.population.checkpoints",
    "mask_padding": "batchnorm.nn.padding",
    "mode": "batchnorm.nn.modes",
    "no_update": "batchnorm.nn.modes",
    "param_groups": "batchnorm.surgery.parameter_groups",
    "preview_export": "batchnorm.surgery.exporting",
    "rank_errors": "batchnorm.exchanges",
    "read_statistics": "batchnorm.population.checkpoints",
    "recompute_outputs": "batchnorm.ops.recomputation",
    "restore": "batchnorm.population.adaptation",
    "reuse_memory": "batchnorm.memory",
    "revert": "batchnorm.surgery.conversion",
    "save_keras": "batchnorm.population.checkpoints",
    "save_memory": "batchnorm.surgery.memory",
    "save_statistics": "batchnorm.population.checkpoints",
    "set_mode": "batchnorm.nn.modes",
    "show_config": "batchnorm.ops.configuration",
    "standardize": "batchnorm.nn.standardization",
    "statistics_keys": "batchnorm.population.averaging",
    "summary": "batchnorm.diagnosis.summary",
    "sync_running_statistics": "batchnorm.population.averaging",
    "to_flax": "batchnorm.population.checkpoints",
    "to_keras": "batchnorm.population.checkpoints",
    "transaction": "batchnorm.nn.modes",
    "tune_example_weight": "batchnorm.population.weighing",
    "unfreeze": "batchnorm.surgery.freezing",
    "use_domain": "batchnorm.nn.domains",
    "watch": "batchnorm.report.live",
}

_MODULES = ("data", "errors", "functional", "integrations", "lab", "nn", "training")

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return _module(f"batchnorm.{name}")
    raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as failure:
        from batchnorm.installation import explained

        error = explained(failure)
        if error is failure:
            raise
        raise error from None


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC) | set(_MODULES))


if TYPE_CHECKING:
    from batchnorm.diagnosis.gap import diagnose as diagnose
    from batchnorm.diagnosis.summary import summary as summary
    from batchnorm.errors import BatchNormError as BatchNormError
    from batchnorm.exchanges import rank_errors as rank_errors
    from batchnorm.memory import reuse_memory as reuse_memory
    from batchnorm.moments import Moments as Moments
    from batchnorm.nn.accumulation import accumulate_exact as accumulate_exact
    from batchnorm.nn.batch_norm import BatchNorm as BatchNorm
    from batchnorm.nn.batch_norm import BatchNorm1d as BatchNorm1d
    from batchnorm.nn.batch_norm import BatchNorm2d as BatchNorm2d
    from batchnorm.nn.batch_norm import BatchNorm3d as BatchNorm3d
    from batchnorm.nn.domains import use_domain as use_domain
    from batchnorm.nn.joining import joinable as joinable
    from batchnorm.nn.modes import accumulate as accumulate
    from batchnorm.nn.modes import mode as mode
    from batchnorm.nn.modes import no_update as no_update
    from batchnorm.nn.modes import set_mode as set_mode
    from batchnorm.nn.modes import transaction as transaction
    from batchnorm.nn.padding import mask_padding as mask_padding
    from batchnorm.nn.recurrent import GRU as GRU
    from batchnorm.nn.recurrent import LSTM as LSTM
    from batchnorm.nn.recurrent import RNN as RNN
    from batchnorm.nn.recurrent import GRUCell as GRUCell
    from batchnorm.nn.recurrent import LSTMCell as LSTMCell
    from batchnorm.nn.recurrent import RNNCell as RNNCell
    from batchnorm.nn.standardization import Standardize as Standardize
    from batchnorm.nn.standardization import standardize as standardize
    from batchnorm.nn.step_batch_norm import StepBatchNorm as StepBatchNorm
    from batchnorm.ops.configuration import show_config as show_config
    from batchnorm.ops.recomputation import recompute_outputs as recompute_outputs
    from batchnorm.population.adaptation import adapt as adapt
    from batchnorm.population.adaptation import restore as restore
    from batchnorm.population.averaging import average_statistics as average_statistics
    from batchnorm.population.averaging import statistics_keys as statistics_keys
    from batchnorm.population.averaging import sync_running_statistics as sync_running_statistics
    from batchnorm.population.calibration import calibrate as calibrate
    from batchnorm.population.checkpoints import load_flax as load_flax
    from batchnorm.population.checkpoints import load_keras as load_keras
    from batchnorm.population.checkpoints import load_statistics as load_statistics
    from batchnorm.population.checkpoints import read_statistics as read_statistics
    from batchnorm.population.checkpoints import save_keras as save_keras
    from batchnorm.population.checkpoints import save_statistics as save_statistics
    from batchnorm.population.checkpoints import to_flax as to_flax
    from batchnorm.population.checkpoints import to_keras as to_keras
    from batchnorm.population.weighing import tune_example_weight as tune_example_weight
    from batchnorm.report.live import watch as watch
    from batchnorm.sources import Renorm as Renorm
    from batchnorm.surgery.acceleration import accelerate as accelerate
    from batchnorm.surgery.conversion import convert as convert
    from batchnorm.surgery.conversion import revert as revert
    from batchnorm.surgery.exporting import preview_export as preview_export
    from batchnorm.surgery.folding import fold as fold
    from batchnorm.surgery.freezing import freeze as freeze
    from batchnorm.surgery.freezing import unfreeze as unfreeze
    from batchnorm.surgery.insertion import insert as insert
    from batchnorm.surgery.memory import save_memory as save_memory
    from batchnorm.surgery.parameter_groups import param_groups as param_groups
    from batchnorm.training.runs import load_run as load_run
