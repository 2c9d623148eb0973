"""The C++ kernels: finds and loads the native library, which registers itself for the CPU key."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

path: Path | None = None
error: str | None = None
_library: ctypes.CDLL | None = None

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "neon")


def load() -> None:
    """Loads the library once; where that fails, `error` says why and ATen serves the CPU."""
    global path, error, _library
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


def available() -> bool:
    """Whether the native library is loaded."""
    return _library is not None


def instruction_set() -> str | None:
    """The instruction set in use: one of `INSTRUCTION_SETS`."""
    return None if _library is None else _library.batchnorm_instruction_set().decode()


def select_instruction_set(name: str) -> bool:
    """Switches to another instruction set (for tests); False where this machine or build lacks it."""
    return _library is not None and bool(_library.batchnorm_select_instruction_set(name.encode()))


def huge_pages(on: bool) -> bool:
    """Whether large fresh outputs ask for huge pages from now on (Linux); returns what was set before."""
    return _library is not None and bool(_library.batchnorm_huge_pages(ctypes.c_bool(on)))


def cache_sizes() -> dict[str, int]:
    """Bytes of each cache level that scheduling reckons with."""
    if _library is None:
        return {}
    return {f"L{level}": int(_library.batchnorm_cache_size(level)) for level in (1, 2, 3)}
