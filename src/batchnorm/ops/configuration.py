"""What is there on this machine, and why something is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

from batchnorm import __version__
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
        "batchnorm": _described(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu kernels": f"C++, {cpu.instruction_set()}" if cpu.available() else f"ATen operations, because {cpu.error}",
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


def _described() -> str:
    """Version and folder; and what pip knows of other versions on the path, whose files may lie among these."""
    folder = Path(__file__).parent.parent
    found = importlib.metadata.distributions(name="batchnorm")
    others = {f"{each.version} in {each.locate_file('')}" for each in found if each.version != __version__}
    note = f"; on the path, too: {', '.join(sorted(others))}: pip uninstall the one not meant" if others else ""
    return f"{__version__} in {folder}{note}"


def _calls() -> str:
    """What serves plain eager calls on the CPU, and why no better does."""
    if cpu.call:
        return "C++"
    if not cpu.available():
        return f"torch's own operator, because {cpu.error}"
    return f"torch's own operator below {cpu.SMALL} elements, else Python, because C++ serves none: {cpu.call_error}"


def show_config() -> None:
    """Prints what implementations and optional packages are there, and why something is not.

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
