"""What is there on this machine, and why something is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

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
        "batchnorm": importlib.metadata.version("batchnorm"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu kernels": f"C++, {cpu.instruction_set()}" if cpu.available() else f"ATen operations, because {cpu.error}",
        "eager calls": "C++" if cpu.call else f"Python, because {cpu.call_error or cpu.error}",
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


def show_config() -> None:
    """Prints what implementations and optional packages are there, and why something is not.

    Example:
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
