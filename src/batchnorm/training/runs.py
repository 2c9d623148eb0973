"""A finished run read again: its network, its weights, and what was done to its data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm import Standardize
from batchnorm.errors import BatchNormError, DataError, InputError
from batchnorm.population.state_dicts import load_state, read_state
from batchnorm.training.config import ResolvedConfig
from batchnorm.training.datasets import Dataset, Inputs, load_data, load_inputs
from batchnorm.training.export import UNFOLDED
from batchnorm.training.files import CHECKPOINT, CONFIG
from batchnorm.training.networks import Rescale, build_network
from batchnorm.training.procedure2 import normalize_network
from batchnorm.training.samples import Preparation
from batchnorm.training.shards import load_parameters
from batchnorm.training.sources import ARROW_FILES, column_names_of
from batchnorm.undo import in_mode

EXAMPLE_SAMPLES = 8
AGAIN = "Use the version that wrote it, or train again."


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Args:
        folder: of the run.
        config: its settings.
        network: with batch norm and the first layer of the data, calibrated, not folded, in evaluation mode; of a run
            that was interrupted, as in its checkpoint.
        example: random samples of the network's input, (8, *input_shape).
        classes: the labels as they were, in the order of the outputs; () in a regression.
        preparation: what was done to raw samples; `prepare` does it.
    """

    folder: Path
    config: ResolvedConfig
    network: nn.Module
    example: Tensor
    classes: tuple[str, ...]
    preparation: Preparation

    def prepare(self, x: Any) -> Tensor:
        """Raw samples, as the data of the run has them, as the network takes them.

        Args:
            x: an array or tensor (N, ...).
        """
        return self.preparation(np.asarray(x))

    def load_data(self, spec: str | None = None, *, labels: str | None = None, seed: int | None = None) -> Dataset:
        """The data of the run, read again and split as it was; or other data, prepared and numbered as that of the run.

        Args:
            spec: other data, in any form that `--data` takes; None: that of the run.
            labels: the file or the column of its labels.
            seed: of its split; None: that of the run.
        """
        return load_data(self.config.data if spec is None else spec, **self._reading(spec, labels, seed))

    def load_inputs(
        self,
        spec: str | None = None,
        *,
        labels: str | None = None,
        seed: int | None = None,
        any_labels: bool = False,
    ) -> Inputs:
        """As `load_data`, but the training part alone, and other data needs no labels: see `Inputs`.

        Args:
            spec, labels, seed: as of `load_data`.
            any_labels: whether labels that cannot be used are left out.
        """
        options = self._reading(spec, labels, seed)
        return load_inputs(self.config.data if spec is None else spec, any_labels=any_labels, **options)

    def label_column(self, spec: str) -> str | None:
        """The column of labels in the table of the run, if `spec` is a table that has it, too."""
        column = self.config.labels
        if column is None or not {Path(name).suffix.lower() for name in (self.config.data, spec)} <= set(ARROW_FILES):
            return None
        return column if column in column_names_of(Path(spec)) else None

    def _reading(self, spec: str | None, labels: str | None, seed: int | None) -> dict[str, Any]:
        """The options with which data is read as that of the run."""
        c = self.config
        if spec is None:
            labels = c.labels
        elif labels is None:
            labels = self.label_column(spec)
        return {
            "seed": c.seed if seed is None else seed,
            "labels": labels,
            "task": "classification" if self.classes else "regression",
            "samples": c.samples if spec is None else None,
            "preparation": self.preparation,
            "classes": self.classes,
        }


def load_run(folder: str | Path) -> Run:
    """Read a run that `train` has made: its network is built again, and gets the weights of the folder.

    Args:
        folder: of the run, as in "runs/figure1-mnist5k-1".

    Returns:
        The run; nothing of its data is read.

    Raises:
        DataError: no run, or files that are damaged or of another version.
        InputError: the factory of the network cannot be called as it was.

    Source: this package; docs/run-files.md has the files.

    Examples:
        >>> run = load_run("runs/figure1-mnist5k-1")  # doctest: +SKIP
        >>> run.network(run.prepare(images)).argmax(1)  # doctest: +SKIP
    """
    folder = Path(folder)
    config, data = _read(folder / CONFIG)
    try:
        shape, outputs = tuple(map(int, data["input_shape"])), int(data["num_classes"])
        dtype = getattr(torch, data["input_dtype"])
        standardize, task, classes = bool(data["standardize"]), data["task"], tuple(map(str, data["classes"]))
        held = data["preparation"]
        lists = {"shift": tuple(map(float, held["shift"])), "columns": tuple(map(str, held.get("columns", ())))}
        preparation = Preparation(**held | lists)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"load_run {folder}: {CONFIG} is damaged or of another version ({error}). {AGAIN}") from error
    size = (EXAMPLE_SAMPLES, *shape)
    generator = torch.Generator().manual_seed(config.seed)
    example = torch.randn(size, generator=generator) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        plain = build_network(config.network, shape, outputs, config.arguments)
        first = Standardize(shape[0]) if standardize else None
        last = Rescale(torch.zeros(outputs), torch.ones(outputs)) if task == "regression" else None
        network = normalize_network(plain, first, last, example, config).normalized
    _load(network, folder)
    return Run(folder, config, in_mode(network, False), example, classes, preparation)


def _load(network: nn.Module, folder: Path) -> None:
    if (folder / UNFOLDED).exists():
        load_state(network, folder / UNFOLDED)
        return
    if not (folder / CHECKPOINT).exists():
        raise DataError(
            f"load_run {folder}: it has neither {UNFOLDED} nor {CHECKPOINT}: its training has kept nothing "
            f"yet. Wait for its first checkpoint, or go on with: batchnorm train --resume {folder}"
        )
    state = read_state(folder / CHECKPOINT)
    try:
        cut = state.get("shards")
        network.load_state_dict(state["contenders"]["batch norm"]["network"], strict=not cut)
        if cut:
            load_parameters(folder / Path(str(cut)).name, "batch norm", network)
    except Exception as error:  # a damaged checkpoint
        raise DataError(f"load_run {folder}: {CHECKPOINT} does not fit the network ({error}).") from error


def _read(path: Path) -> tuple[ResolvedConfig, dict[str, Any]]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return ResolvedConfig.from_dict(held["config"]), held["data"]
    except OSError as error:
        raise DataError(
            f"load_run {path.parent}: {path.name} cannot be read ({error.strerror or error}); "
            "expected the folder of a run."
        ) from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, BatchNormError) as error:
        raise DataError(
            f"load_run {path.parent}: {path.name} is damaged or of another version ({error}). {AGAIN}"
        ) from error
