"""State dicts as their users have them: nested in a checkpoint, with the names that wrappers add, of many dtypes."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import DataError
from batchnorm.population.formats.containers import are_arrays, npz
from batchnorm.population.formats.plain_pickles import LostValuesError, NotPlainError, load_plain

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that torch.compile, FSDP and checkpointing put into a network's."""
_AVERAGING = {"n_averaged"}
"""Entries of `torch.optim.swa_utils.AveragedModel` beside the network's own."""
_DEEPEST = 3


def read_state(path: str | os.PathLike[str]) -> Any:
    """What a .safetensors file, an .npz or a file of torch.save holds; no pickled code is run.

    Raises:
        DataError: it cannot be read, is damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if are_arrays(names):
                return npz(path)
            try:
                return load_plain(path.read_bytes())
            except LostValuesError:
                raise
            except NotPlainError:  # torch's own restricted reader knows more kinds of tensors
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on pickles that it is about to refuse
            return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except LostValuesError as error:
        raise DataError(
            f"weights {path}: {error}. The values are not in the file: it was cut, or written by one rank of a sharded "
            "training. Save a whole state dict again."
        ) from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights {path}: it is damaged, or holds more than tensors; pickled code is never run. Expected a "
            ".safetensors file, or a state dict saved by torch.save(net.state_dict(), path)."
        ) from error
    except Exception as error:  # damaged archives make the readers raise anything
        raise _unreadable(path, error) from error


def load_state(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of a file into ``net``, in place.

    The state dict may be nested in a checkpoint (``{"state_dict": ...}``, ``{"model": ...}``), and its names may have
    what DataParallel, torch.compile and other wrappers put before them.

    Raises:
        DataError: the file cannot be read, or its tensors are not those of the network.
    """
    state = matching_state(net, read_state(path), f"weights {path}")
    try:
        net.load_state_dict(state)
    except Exception as error:
        raise _unreadable(Path(path), error) from error


def matching_state(net: nn.Module, state: Any, source: str) -> OrderedDict[str, Tensor]:
    """The entries of a state dict or checkpoint by the names of ``net``, each of a dtype that can be loaded.

    Args:
        net: the network.
        state: a state dict of tensors or arrays, or a dictionary that holds one.
        source: what to call it in messages.

    Raises:
        DataError: no state dict, several that fit, other names, or values that are no weights of such a network.
    """
    expected = net.state_dict()
    found = list(state_dicts(state))
    if not found:
        raise DataError(
            f"{source}: it holds a {type(state).__name__} and no state dict. Expected what net.state_dict() returns."
        )
    fitting = [(name, made) for name, given in found if (made := renamed_state(given, net)) is not None]
    if len(fitting) > 1 and not all(_same(made, fitting[0][1]) for _, made in fitting[1:]):
        names = ", ".join(repr(name or "the whole") for name, _ in fitting)
        raise DataError(f"{source}: {names} all fit the network; save the one to load in a file of its own.")
    if not fitting:
        raise DataError(f"{source}: {_difference(max(found, key=lambda item: _common(item[1], expected)), expected)}")
    chosen = fitting[0][1]
    for key, value in chosen.items():
        if key in expected and (reason := _obstacle(value, expected[key])) is not None:
            raise DataError(f"{source}: {key} {reason}")
    return chosen


def as_tensor(value: Any) -> Any:
    """An array as a tensor; all else as it is."""
    return torch.from_numpy(np.array(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def state_dicts(state: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All dictionaries inside a checkpoint that have tensors by names, with the path to each."""
    if not isinstance(state, Mapping) or depth > _DEEPEST:
        return
    if any(isinstance(key, str) and isinstance(as_tensor(value), Tensor) for key, value in state.items()):
        yield name, state
    for key, value in state.items():
        yield from state_dicts(value, f"{name}.{key}" if name else str(key), depth + 1)


def _same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    if one.keys() != two.keys():
        return False
    pairs = [(value, two[key]) for key, value in one.items()]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def renamed_state(given: Mapping[str, Any], net: nn.Module, needed: Iterable[str] = ()) -> OrderedDict[str, Any] | None:
    """A state dict by the network's names; None where the names differ by more than wrappers and one prefix.

    Args:
        given: names to tensors or arrays.
        net: the network.
        needed: entries that must be there; by default all parameters.
    """
    expected = net.state_dict(keep_vars=True)
    needed = {_plain(key) for key in needed or expected if needed or isinstance(expected[key], nn.Parameter)}
    theirs = {key: _plain(key) for key in given if isinstance(key, str) and key not in _AVERAGING}
    names = set(theirs.values())
    change = _change(names, needed or {_plain(key) for key in expected})
    if change is None or len(names) != len(theirs):
        return None
    less, more = change

    def ours(plain: str) -> str:
        return more + plain.removeprefix(less)

    exact = {_plain(key): key for key in expected}
    made: OrderedDict[str, Any] = OrderedDict(
        (exact.get(ours(plain), ours(plain)), as_tensor(given[key])) for key, plain in theirs.items()
    )
    metadata = getattr(given, "_metadata", None)
    if isinstance(metadata, Mapping):  # by modules, "" for the network itself
        modules = {_plain(name): name for name, _ in net.named_modules()}
        places = {key: ours(f"{_plain(key)}." if key else "").rstrip(".") for key in sorted(metadata, key=len)}
        made._metadata = OrderedDict(  # type: ignore[attr-defined]
            (modules.get(place, place), metadata[key]) for key, place in places.items()
        )
    return made


def _change(theirs: set[str], needed: set[str]) -> tuple[str, str] | None:
    """The prefix to take from all of their names, and the one to put before them, so that all needed ones are there."""
    if needed <= theirs:
        return "", ""
    last = min(needed, key=len)
    for key in theirs:
        if key.endswith(f".{last}"):
            prefix = key.removesuffix(last)
            if {f"{prefix}{name}" for name in needed} <= theirs and all(name.startswith(prefix) for name in theirs):
                return prefix, ""
        elif last.endswith(f".{key}"):
            prefix = last.removesuffix(key)
            if needed <= {f"{prefix}{name}" for name in theirs}:
                return "", prefix
    return None


def _common(given: Mapping[str, Any], expected: Mapping[str, Tensor]) -> int:
    return len({_plain(str(key)) for key in given} & {_plain(key) for key in expected})


def _difference(found: tuple[str, Mapping[str, Any]], expected: Mapping[str, Tensor]) -> str:
    name, given = found
    theirs, ours = {_plain(str(key)) for key in given}, {_plain(key) for key in expected}
    missing, more = sorted(ours - theirs), sorted(theirs - ours)
    where = f"its state dict {name!r}" if name else "its state dict"
    parts = [f"lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"] if missing else []
    parts += [f"has {', '.join(more[:3])}{' and others' if len(more) > 3 else ''} instead"] if more else []
    return f"{where} {' and '.join(parts)}. Expected the names of this network, with or without one prefix."


def _obstacle(value: Any, expected: Tensor) -> str | None:
    """Why a tensor cannot be loaded as it is; torch would cast it without a word."""
    if not isinstance(expected, Tensor) or is_lazy(expected):  # a module's extra state, or sizes to come
        return None
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor."
    if value.is_quantized:
        return f"is quantized ({value.dtype}). Load value.dequantize() of each such tensor."
    if value.is_meta or (value.numel() == 0 and expected.numel() > 0):
        return (
            f"is empty, and the network needs {tuple(expected.shape)}. Its values are not in the file: sharded "
            "training and meta devices leave such entries. Save a whole state dict."
        )
    if value.dtype == expected.dtype or not (expected.is_floating_point() or expected.is_complex()):
        return _to_integers(value, expected)
    if value.is_complex() and not expected.is_complex():
        return f"is {value.dtype}, and the network's is {expected.dtype}: the imaginary part would be lost."
    if not (value.is_floating_point() or value.is_complex()):
        return (
            f"is {value.dtype}, codes of a quantized network or a mask, and the network's is {expected.dtype}. Load "
            "the values that they stand for: multiply by the scales that the file's program keeps."
        )
    if value.dtype.itemsize == 1:
        return (
            f"is {value.dtype}, which is stored with a scale, and the network's is {expected.dtype}. Load "
            "value.float() times its scale."
        )
    return None


def _to_integers(value: Tensor, expected: Tensor) -> str | None:
    if value.dtype == expected.dtype or not (value.is_floating_point() or value.is_complex()):
        return None
    if not value.is_complex() and torch.equal(value, value.round()):
        return None
    return f"is {value.dtype} with values that are no integers, and the network's is {expected.dtype}."


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or ["no message"])[:3]
    return DataError(
        f"weights {path}: {type(error).__name__}: {' '.join(map(str.strip, reason))}. Expected "
        "a .safetensors file, or a state dict saved by torch.save or numpy.savez, of this network."
    )
