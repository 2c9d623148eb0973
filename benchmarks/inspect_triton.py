"""Compiles the Triton kernels for a GPU that need not be there, and shows what the compiler made of them.

    python -m benchmarks.inspect_triton [--capability 90]

For each kernel, order and dtype of the large shapes, as the shipped table tiles them: registers a thread, bytes that
spill, shared memory, the widest load, and float64 instructions inside loops. Nothing runs and nothing is timed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPES = ((32, 256, 56, 56), (32, 2048, 7, 7), (256, 256))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Target:
    """As much of a driver as compiling needs: the device that is compiled for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Launches compile for this compute capability, with the arguments that they get, and do not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from batchnorm.kernels import triton as kernels

    found: list[Any] = []
    run, device, active = JITFunction.run, kernels._device, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    kernels._plan.cache_clear()
    driver.set_active(Target(capability))
    JITFunction.run = compile_only
    kernels._device = lambda _: (132, f"{capability // 10}.{capability % 10}")  # type: ignore[assignment]
    try:
        yield found
    finally:
        JITFunction.run, kernels._device, driver._active = run, device, active
        kernels._plan.cache_clear()


class Compiled(NamedTuple):
    """What the compiler made of a kernel; bytes, but for the registers of a thread and counts of instructions."""

    name: str
    registers: int
    spilled: int
    shared: int
    load: int  # bytes of the widest load
    doubles: int  # float64 instructions inside loops


def inspect(kernel: Any) -> Compiled:
    """Reads the binary and the assembly of a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    return Compiled(
        kernel.src.fn.__name__, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"],
        max((int(v or 1) * int(bits) // 8 for v, bits in re.findall(LOAD, ptx)), default=0), doubles_in_loops(ptx),
    )  # fmt: skip


LOAD = r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)"


def doubles_in_loops(ptx: str) -> int:
    """float64 instructions between a label and a branch back to it."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$\S+:", line)}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            inside |= set(range(labels[jump[1]], i))
    return sum(1 for i in inside if re.match(r"(@\S+ )?\w[\w.]*\.f64\b", lines[i]))


def call_everything(x: Tensor, activation: str, signs: Tensor | None, mask: Tensor | None = None) -> None:
    """A forward and a backward, with a residual, and inference."""
    from batchnorm.kernels import triton as kernels

    channels = x.shape[1]
    weight, bias, residual = torch.ones(channels), torch.zeros(channels), torch.empty_like(x)
    settings = (0, 1e-5, activation, 0.1)
    y, mean, var = kernels.forward(x, weight, bias, residual, *settings, signs, mask)
    saved = (weight, bias, None if signs is not None else residual, signs, mean, var)
    kernels.backward(y, x, *saved, *settings, False, True, True, mask)
    kernels.normalize(x, mean, var, weight, bias, None, *settings, None, mask)


def variants() -> Iterator[tuple[str, Tensor, Tensor | None, Tensor | None]]:
    """Title, x, signs and mask of what is worth a look."""
    from batchnorm.ops.schemas import signs_size

    for shape in SHAPES:
        for dtype in DTYPES:
            for last in (False, True) if len(shape) == 4 else (False,):
                x = torch.empty(shape, dtype=dtype)
                x = x.to(memory_format=torch.channels_last) if last else x
                order = "channels_last" if last else "contiguous"
                title = f"{shape} {str(dtype).removeprefix('torch.')} {order}"
                yield f"{title}, relu, residual", x, torch.empty(signs_size(x), dtype=torch.uint8), None
                if shape == SHAPES[0]:
                    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
                    yield f"{title}, relu, residual, mask", x, None, mask


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--capability", type=int, default=90, help="90 is that of H100 and H200, 80 of A100")
    options = parser.parse_args()
    table = Table("case", *Compiled._fields, title=f"compute capability {options.capability}; compiled, not run")
    with compiling(options.capability) as found:
        for title, x, signs, mask in variants():
            del found[:]
            call_everything(x, "relu", signs, mask)
            for kernel in found:
                name, *numbers = inspect(kernel)
                table.add_row(title, name, *map(str, numbers))
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
