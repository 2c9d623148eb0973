"""What is there on this machine, and why something is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from batchnorm import installation
from batchnorm import ops as _ops  # noqa: F401  (loads the implementations)
from batchnorm.kernels import cpu
from batchnorm.ops import cuda

_OPTIONAL = {
    "matplotlib": "plots",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "mlxtend": "demo",
    "sklearn": "demo",
    "triton": "gpu",
}


def configuration() -> dict[str, Any]:
    """Versions, the implementation that each kind of device gets, cache sizes, and optional packages."""
    gpu = "none found"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        gpu = f"{torch.cuda.get_device_name()}: {cuda.describe(device)}"
    return {
        "batchnorm": installation.described(),
        "files": installation.condition(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu kernels": _kernels(),
        "eager calls": _calls(),
        "native library": str(cpu.path) if cpu.path else None,
        "caches": ", ".join(f"{k} {v // 1024} KB" for k, v in cpu.cache_sizes().items()) or None,
        "gpu": gpu,
        "optional packages": {
            name: importlib.metadata.version("scikit-learn" if name == "sklearn" else name)
            if importlib.util.find_spec(name)
            else f"not installed: pip install 'batchnorm[{extra}]'"
            for name, extra in _OPTIONAL.items()
        },
    }


def _kernels() -> str:
    """What computes on the CPU, and why nothing better does."""
    if not cpu.available():
        return f"ATen operations, because {cpu.error}"
    lacks = cpu.missing_features()
    return f"C++, {cpu.instruction_set()}" + (f"; this processor lacks {', and '.join(lacks)}" if lacks else "")


def _calls() -> str:
    """What serves plain eager calls on the CPU, and why no better does."""
    if cpu.call:
        return "C++"
    if not cpu.available():
        return f"torch's own operator, because {cpu.error}"
    return f"torch's own operator below {cpu.SMALL} elements, else Python, because C++ serves none: {cpu.call_error}"


def show_config() -> None:
    """Prints what implementations and optional packages are there, and why something is not.

    Returns:
        Nothing.

    Raises:
        No error: a part that is broken is a line of the text.

    Source: this package.

    Examples:
        >>> show_config()  # doctest: +ELLIPSIS
        batchnorm         ...
    """
    for key, value in configuration().items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, what in value.items():
                print(f"  {name:<15} {what}")
        else:
            print(f"{key:<17} {value}")
