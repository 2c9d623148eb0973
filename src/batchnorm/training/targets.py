"""Labels and targets as people have them: any integers or texts as classes, floats as targets of a regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import DataError
from batchnorm.training.sources import Array

TASKS = ("classification", "regression")
MANY = 10  # classes that a message lists


@dataclass(frozen=True)
class Targets:
    """What is to be learned.

    Args:
        task: "classification" or "regression".
        y_train, y_test: (N,) int64 in [0, outputs), or (N, outputs) float32.
        outputs: of the network: classes, or targets.
        classes: the labels as they were, in the order of their numbers; () in a regression.
        notes: what was done to them, a sentence each.
    """

    task: str
    y_train: Tensor
    y_test: Tensor
    outputs: int
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def task_of(name: str, y: Array, asked: str | None) -> str:
    """The task that was asked for, or the one that goes with the dtype: floats are a regression.

    Raises:
        DataError: labels that cannot be of that task.
    """
    if y.dtype.kind not in "iubfSUO":
        raise DataError(f"data {name}: y has dtype {y.dtype}, expected numbers or texts.")
    if asked == "regression" and y.dtype.kind not in "iubf":
        raise DataError(f"data {name}: y has dtype {y.dtype}, and a regression needs numbers. Leave --task out.")
    task = asked or ("regression" if y.dtype.kind == "f" else "classification")
    if task == "classification" and y.ndim > 1:
        hint = f" {ONE_HOT}" if is_one_hot(y) else " Rows of numbers are the targets of a regression."
        raise DataError(f"data {name}: y has shape {y.shape}, and classes need one label for each sample.{hint}")
    if asked == "classification" and y.dtype.kind == "f":
        _check_repeated(name, y)
    return task


def _check_repeated(name: str, y: Array) -> None:
    """Raise DataError where labels are nearly all different."""
    different = len(np.unique(y))
    if different > max(2, len(y) // 2):
        raise DataError(
            f"data {name}: {different} different labels in {len(y)} samples; expected classes with several samples "
            "each. If they are numbers to predict, they are the targets of a regression."
        )


def check_rows(name: str, part: str, y: Array, shape: tuple[int, ...]) -> None:
    """Raise DataError unless there is one label, or one row of targets, for each sample."""
    targets = y.ndim == 2 and y.dtype.kind == "f"
    if not (y.ndim == 1 or targets) or (shape and len(y) != shape[0]):
        hint = f" {ONE_HOT}" if y.ndim == 2 and is_one_hot(y) else ""
        raise DataError(
            f"data {name}: {part} has shape {y.shape}, expected one label, or one row of targets, for each sample of "
            f"{part.replace('y', 'x')}, whose shape is {shape}.{hint}"
        )


ONE_HOT = "Each of its rows has a single 1 among zeros; if these are classes, give their numbers, as y.argmax(1)."


def is_one_hot(y: Array) -> bool:
    """Whether each of several columns is 0 or 1, and each row has a single 1."""
    if y.ndim != 2 or y.shape[1] < 2 or y.dtype.kind not in "iubf":
        return False
    return bool(np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all())


def plain(y: Array, name: str, part: str) -> Array:
    """Labels as integers, floats or texts: objects that are texts or numbers become these."""
    if y.dtype.kind == "S":
        return np.char.decode(y, "utf-8", "replace")
    if y.dtype.kind == "O":
        kinds = {type(value).__name__ for value in y.flat}
        if kinds == {"str"}:
            return y.astype(str)
        raise DataError(f"data {name}: {part} holds objects ({', '.join(sorted(kinds))}), expected numbers or texts.")
    return y


def classes_of(name: str, y: Array, y_test: Array, known: Sequence[str] = ()) -> Targets:
    """Class numbers from 0 up, in the order of the labels; or those that the labels have in a run.

    Args:
        name: of the data.
        y, y_test: the labels.
        known: the labels of the run, in the order of their numbers; () if there is none.

    Raises:
        DataError: fewer than two classes, a class for almost each sample, or a test label that training lacks.
    """
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise DataError(f"data {name}: {int((~np.isfinite(y)).sum())} labels of y are NaN or infinite.")
    if known:
        of_run, of_run_test = _numbers(name, y, known), _numbers(name, y_test, known)
        return Targets("classification", of_run, of_run_test, len(known), tuple(known), ())
    labels, numbers = np.unique(y, return_inverse=True)
    if len(labels) < 2:
        raise DataError(f"data {name}: every training label is {labels[0]}, expected two classes or more.")
    if len(labels) > max(2, len(y) // 2):
        raise DataError(
            f"data {name}: {len(labels)} different labels in {len(y)} training samples; expected classes with several "
            "samples each. If they are numbers to predict, give --task regression."
        )
    unknown = np.flatnonzero(~np.isin(y_test, labels))
    if len(unknown):
        raise DataError(
            f"data {name}: y_test has the label {y_test[unknown[0]]}, which no training sample has; the training "
            f"labels are {_listed(labels)}."
        )
    notes = []
    if labels.dtype.kind not in "iub" or not np.array_equal(labels.astype(np.int64), np.arange(len(labels))):
        notes.append(f"Labels became class numbers: {_listed(labels, numbered=True)}.")
    test_numbers = np.searchsorted(labels, y_test)
    y_train_t, y_test_t = (torch.from_numpy(part.reshape(-1).astype(np.int64)) for part in (numbers, test_numbers))
    return Targets("classification", y_train_t, y_test_t, len(labels), tuple(map(str, labels.tolist())), tuple(notes))


def _numbers(name: str, y: Array, known: Sequence[str]) -> Tensor:
    """The numbers that labels have in a run."""
    labels, places = np.unique(y, return_inverse=True)
    numbers = {label: number for number, label in enumerate(known)}
    unknown = [label for label in map(str, labels.tolist()) if label not in numbers]
    if unknown:
        raise DataError(
            f"data {name}: y has the label {unknown[0]}, which the run does not know; its labels are "
            f"{_listed(np.array(known))}."
        )
    found = np.array([numbers[str(label)] for label in labels.tolist()], dtype=np.int64)
    return torch.from_numpy(found[places.reshape(-1)])


def values_of(name: str, y: Array, y_test: Array) -> Targets:
    """Targets of a regression, (N, K) in float32.

    Raises:
        DataError: values that are not finite in float32, or a target that is constant in training.
    """
    parts = []
    for part, values in (("y", y), ("y_test", y_test)):
        bad = ~(np.abs(values.astype(np.float64)) <= np.finfo(np.float32).max)
        if bad.any():
            count = int(bad.sum())
            what = f"{count} targets of {part} are" if count > 1 else f"a target of {part} is"
            raise DataError(f"data {name}: {what} NaN, infinite or beyond float32.")
        parts.append(torch.from_numpy(np.ascontiguousarray(values.reshape(len(values), -1), dtype=np.float32)))
    constant = np.flatnonzero(np.ptp(parts[0].numpy(), axis=0) == 0)
    if len(constant):
        raise DataError(f"data {name}: target {constant[0]} is {parts[0][0, constant[0]]:g} in every training sample.")
    whole = y.dtype.kind == "f" and np.array_equal(y, np.round(y)) and len(np.unique(y)) <= MANY * 2
    hint = " They are whole numbers; --task classification takes them for classes." if whole and y.ndim == 1 else ""
    hint = f" {ONE_HOT}" if is_one_hot(y) else hint
    notes = (f"Targets are taken as numbers to predict.{hint}",)
    return Targets("regression", parts[0], parts[1], parts[0].shape[1], (), notes)


def _listed(labels: Array, *, numbered: bool = False) -> str:
    shown = [f"{label} is {k}" if numbered else str(label) for k, label in enumerate(labels[:MANY])]
    return ", ".join(shown) + (f" and {len(labels) - MANY} more" if len(labels) > MANY else "")
