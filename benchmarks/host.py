"""What one layer costs the host on the Triton path, by a stand-in that launches nothing: python -m benchmarks.host

Tensors are on the CPU, operators are served by the code that serves CUDA, and each launch of a kernel returns at once.
So the times are those of Python, of torch's dispatcher and autograd, and of making the outputs. Triton's own launcher,
which needs a device, comes on top. Times are the thread's.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

SHAPE = (64, 32)
ROUNDS, CALLS = 30, 50


def _launch_nothing(*args: Any, **options: Any) -> None:
    """Stands for a kernel with its grid."""


def serve_by_triton() -> Any:
    """Puts the Triton path in place of the CPU's, without launches; the library that holds the registrations."""
    os.environ["TRITON_INTERPRET"] = "1"
    from batchnorm.kernels import cpu, triton
    from batchnorm.kernels import triton_kernels as kernels
    from batchnorm.ops import cuda, schemas

    cpu.load()
    cpu.call = None
    cuda._kernels = triton
    cuda._reasons[torch.device("cpu")] = None
    for name in dir(kernels):
        kind = type(getattr(kernels, name))
        if kind.__name__ == "InterpretedFunction":
            kind.__getitem__ = lambda self, grid: _launch_nothing

    def fail(*args: Any) -> None:
        raise RuntimeError("a call that Triton does not serve")

    library = torch.library.Library("batchnorm", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the CPU's registrations are overridden
        for name in ("forward", "normalize", "backward", "update_statistics"):
            library.impl(name, schemas.by_name(name, cuda.implementation(name, fail)), "CPU", allow_override=True)
    return library


def microseconds(call: Callable[[], object]) -> float:
    """The least over rounds of the mean time of a call."""
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time() - begin) / CALLS)
    return min(times) * 1e6


def main() -> None:
    torch.set_num_threads(1)
    library = serve_by_triton()
    import batchnorm as bn
    from batchnorm.kernels import triton

    x = torch.randn(SHAPE, requires_grad=True)
    dy = torch.randn(SHAPE)
    plain = torch.nn.BatchNorm1d(SHAPE[1])
    layer = bn.BatchNorm1d(SHAPE[1], activation="relu")
    own = (layer.weight.detach(), layer.bias.detach(), None, 0, 1e-5, "relu", 0.0, None)
    detached = x.detach()
    rows = {
        "torch.nn.BatchNorm1d and ReLU on the CPU, forward": lambda: torch.relu(plain(x)),
        "layer, forward": lambda: layer(x),
        "layer, forward and backward": lambda: layer(x).backward(dy),
        "the forward's code around its launch": lambda: triton.forward(detached, *own),
    }
    for name, call in rows.items():
        call()
        print(f"{microseconds(call):7.1f} us  {name}")
    del library


if __name__ == "__main__":
    sys.exit(main())
