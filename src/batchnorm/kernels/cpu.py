"""The C++ kernels: finds and loads the native library, which registers itself for the CPU key.

A second one, `_autograd`, makes plain eager calls without Python. It is for one torch and one Python alone; where they
are others, or it is missing, the calls go through Python, with the same results.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

path: Path | None = None
error: str | None = None
call: Callable[..., Any] | None = None  # of `_autograd`; see ops/autograd.py
call_error: str | None = None
_library: ctypes.CDLL | None = None

_CALLS = "batchnorm._autograd"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "neon")


def load() -> None:
    """Loads the library once; where that fails, `error` says why and ATen serves the CPU."""
    global path, error, _library
    if _library is not None:
        return
    spec = importlib.util.find_spec("batchnorm._C")
    if spec is None or spec.origin is None:
        error = "the native library was not built (no C++ compiler at installation)"
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
    _load_calls(_library)


def _load_calls(library: ctypes.CDLL) -> None:
    """Loads `_autograd` where it was built with this torch; else `call_error` says why calls go through Python."""
    global call, call_error
    try:
        module = importlib.import_module(_CALLS)
    except ImportError as failure:
        missing = isinstance(failure, ModuleNotFoundError)
        call_error = "it was not built for this Python" if missing else f"it does not load: {failure}"
        return
    if module.torch_version != str(torch.__version__):
        call_error = f"it was built with torch {module.torch_version}; install batchnorm again"
        return
    library.batchnorm_operators.restype = ctypes.c_void_p
    module.attach(library.batchnorm_operators())
    call = module.call


def available() -> bool:
    """Whether the native library is loaded."""
    return _library is not None


def instruction_set() -> str | None:
    """The instruction set in use: one of `INSTRUCTION_SETS`."""
    return None if _library is None else _library.batchnorm_instruction_set().decode()


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
