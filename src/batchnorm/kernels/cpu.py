"""The C++ kernels: finds and loads the native library, which registers itself for the CPU key.

A second one, `_autograd`, makes plain eager calls without Python. There is one for each minor version of torch. Where
this torch has none, small calls go to torch's own operator (ops/by_torch.py), and all others through Python.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import math
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from batchnorm.installation import MEND, is_cut_short

path: Path | None = None
error: str | None = None
call: Callable[..., Any] | None = None  # of `_autograd`; see ops/autograd.py
calls: Any = None  # that module
call_error: str | None = None
_library: ctypes.CDLL | None = None

# Without `_autograd`, plain calls on fewer elements than this go to torch's own operator: through Python, forward and
# backward cost about 80 us more than torch's, and the kernels earn that back between 32,768 and 100,352 elements
# (float32, BN + ReLU, torch 2.13, one thread).
SMALL = 100_000
torch_below: float = 0  # in force: 0 with `_autograd`, infinite without the native library

_VERSION = re.compile(r"(\d+)\.(\d+)\.")
_RELEASE = re.compile(r"(\d+)\.(\d+)\.\d+(?:\+.*)?")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "neon")
# What a processor of x86-64 must have for the better two, best first.
_FEATURES = {"avx512": "AVX-512 F, BW, VL and DQ", "avx2": "AVX2, FMA and F16C"}


def load() -> None:
    """Loads the library once; where that fails, `error` says why and ATen serves the CPU."""
    global torch_below
    if _library is None:
        _load()
        torch_below = math.inf if _library is None else SMALL if call is None else 0


def _load() -> None:
    global path, error, _library
    spec = importlib.util.find_spec("batchnorm._C")
    if spec is None or spec.origin is None:
        error = (
            f"the native library is not in {Path(__file__).parent.parent}: there was no C++ compiler at installation, "
            f"or it was deleted; {MEND}"
        )
        return
    if is_cut_short(Path(spec.origin)):
        error = f"the native library {spec.origin} is cut short; {MEND}"
        return
    try:
        torch.ops.load_library(spec.origin)
        _library = ctypes.CDLL(spec.origin)
    except OSError as failure:
        error = f"the native library does not load: {failure}"
        return
    _library.batchnorm_instruction_set.restype = ctypes.c_char_p
    _library.batchnorm_select_instruction_set.restype = ctypes.c_bool
    _library.batchnorm_huge_pages.restype = ctypes.c_bool
    _library.batchnorm_cache_size.restype = ctypes.c_int64
    path = Path(spec.origin)
    _load_calls(_library, path)


def _load_calls(library: ctypes.CDLL, beside: Path) -> None:
    """Loads the `_autograd` of this minor version of torch; else `call_error` says why calls go another way."""
    global call, calls, call_error
    running = str(torch.__version__)
    version = _VERSION.match(running)
    file = beside.with_name(beside.name.replace("_C", f"_autograd_{version[1]}_{version[2]}" if version else "", 1))
    if not version or not file.is_file():
        known = sorted(each.name.split(".")[0][10:].replace("_", ".") for each in beside.parent.glob("_autograd_*"))
        call_error = f"this installation has none for torch {running} (it has: {', '.join(known) or 'none at all'})"
        return
    if is_cut_short(file):
        call_error = f"{file} is cut short; {MEND}"
        return
    try:
        module = _module(file)
    except ImportError as failure:
        call_error = f"it does not load: {failure}"
        return
    if not serves(module.torch_version, running):
        call_error = f"it was built with torch {module.torch_version}, this is {running}; install batchnorm again"
        return
    library.batchnorm_operators.restype = ctypes.c_void_p
    probe = torch.empty(0)
    if not module.attach(library.batchnorm_operators(), probe, probe._cdata):
        call_error = "tensors of this torch and Python do not lie in memory as it expects"
        return
    call, calls = module.call, module


def _module(file: Path) -> Any:
    """The extension module in a file, under the one name that all of them have inside."""
    loader = importlib.machinery.ExtensionFileLoader("batchnorm._autograd", str(file))
    spec = importlib.util.spec_from_file_location("batchnorm._autograd", file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def serves(built: str, running: str) -> bool:
    """Whether what was built with one torch may run with another: releases of one minor version, or the very same."""
    one, other = (_RELEASE.fullmatch(each) for each in (built, running))
    return built == running or bool(one and other and one.groups() == other.groups())


def available() -> bool:
    """Whether the native library is loaded."""
    return _library is not None


def instruction_set() -> str | None:
    """The instruction set in use: one of `INSTRUCTION_SETS`."""
    return None if _library is None else _library.batchnorm_instruction_set().decode()


def missing_features() -> list[str]:
    """What this processor lacks for better instruction sets than the one in use, best first."""
    own = instruction_set()
    if own not in ("baseline", *_FEATURES) or platform.machine() not in ("x86_64", "AMD64"):
        return []
    names = list(_FEATURES)
    return [_FEATURES[name] for name in names[: names.index(own) if own in names else None]]


def select_instruction_set(name: str) -> bool:
    """Switches to another instruction set (for tests); False where this machine or build lacks it."""
    load()
    return _library is not None and bool(_library.batchnorm_select_instruction_set(name.encode()))


def huge_pages(on: bool) -> bool:
    """Whether large fresh outputs ask for huge pages from now on (Linux); returns what was set before."""
    load()
    return _library is not None and bool(_library.batchnorm_huge_pages(ctypes.c_bool(on)))


def cache_sizes() -> dict[str, int]:
    """Bytes of each cache level that scheduling reckons with."""
    if _library is None:
        return {}
    return {f"L{level}": int(_library.batchnorm_cache_size(level)) for level in (1, 2, 3)}
