"""Measures the tilings of the Triton kernels on this device and writes src/batchnorm/kernels/triton_table.py.

    python -m benchmarks.tune_triton [--dry-run]

For each kind of pass, memory order and element size, knobs are changed one at a time from the default (coordinate
descent); the score is the geometric mean over shapes of the time in a CUDA graph over buffers beyond the L2 cache.
"""

from __future__ import annotations

import argparse
import datetime
import math
import pprint
import re
import sys
from pathlib import Path
from typing import Any

import torch

from batchnorm.kernels import triton as kernels
from batchnorm.kernels import triton_table
from batchnorm.ops import cuda
from benchmarks.gpu import Device, medians

CHOICES: dict[str, tuple[int, ...]] = {
    "tile": (1024, 2048, 4096, 8192),
    "warps": (2, 4, 8),
    "waves": (1, 2, 4, 8),
    "whole": (0, 32768, 131072, 262144),
    "single": (2048, 4096, 8192, 16384),
    "each": (8, 16, 32),
    "merged": (0, 4096, 16384, 65536),
    "run": (1, 2, 4, 8),
}
SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
DENSE = ((8192, 1024), (256, 256), (64, 32))


class Subject:
    """One kind of pass on one shape, over rotated buffers."""

    def __init__(self, device: Device, kind: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
        memory = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        size = 3 * torch.empty(shape, dtype=dtype, device="meta").nbytes
        count = min(max(-(-4 * device.cache() // size), 2), 64)
        self.device, self.kind = device, kind
        self.xs = [torch.randn(shape, device=device.name).to(dtype).to(memory_format=memory) for _ in range(count)]
        self.dys = [torch.randn_like(x) for x in self.xs]
        self.weight, self.bias = (torch.randn(shape[1], device=device.name) for _ in range(2))
        _, self.mean, self.var = kernels.forward(self.xs[0], None, None, None, 0, 1e-5, "identity", 0.0, None)

    def calls(self) -> list[Any]:
        settings = (0, 1e-5, "relu", 0.0)
        affine, saved = (self.weight, self.bias, None), (self.weight, self.bias, None, None, self.mean, self.var)
        if self.kind == "forward":
            return [lambda x=x: kernels.forward(x, *affine, *settings, None) for x in self.xs]
        if self.kind == "map":
            return [lambda x=x: kernels.normalize(x, self.mean, self.var, *affine, *settings, None) for x in self.xs]
        return [
            lambda x=x, dy=dy: kernels.backward(dy, x, *saved, *settings, False, True, False)
            for x, dy in zip(self.xs, self.dys, strict=True)
        ]

    def time(self, rounds: int = 9) -> float:
        return medians(self.device, {"ours": self.device.graph(self.calls, warm=False)}, rounds)["ours"] * 1e3


def score(subjects: list[Subject], key: tuple[str, str, int], capability: str, knobs: triton_table.Knobs) -> float:
    """The geometric mean of milliseconds under these knobs."""
    triton_table.TABLE.setdefault(capability, {})[key] = knobs
    kernels._plan.cache_clear()
    return math.exp(sum(math.log(subject.time()) for subject in subjects) / len(subjects))


def tune(
    device: Device, kind: str, order: str, dtype: torch.dtype, capability: str
) -> tuple[tuple[str, str, int], triton_table.Knobs]:
    """The best knobs found, changed one at a time, twice over."""
    shapes = (*SHAPES, *DENSE) if order == "interleaved" else SHAPES
    subjects = [Subject(device, kind, shape, dtype, order == "interleaved") for shape in shapes]
    key = (kind, order, dtype.itemsize)
    best = triton_table.lookup("untuned", *key)
    least = score(subjects, key, capability, best)
    for _ in range(2):
        for name in CHOICES:
            for value in CHOICES[name]:
                knobs = best._replace(**{name: value})
                if knobs == best:
                    continue
                now = score(subjects, key, capability, knobs)
                if now < 0.99 * least:  # what is within the noise stays as it is
                    best, least = knobs, now
    print(f"{key}: {best}, {least:.4f} ms", flush=True)
    return key, best


def write(path: Path, capability: str, entries: dict[tuple[str, str, int], triton_table.Knobs]) -> None:
    """Replaces the table's entries of this capability, and what was measured."""
    import triton

    measured = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    table = {**triton_table.TABLE, capability: entries}
    types = {"MEASURED": "dict[str, str]", "TABLE": "dict[str, dict[tuple[str, str, int], Knobs]]"}
    text = path.read_text()
    for name, value in (("MEASURED", measured), ("TABLE", table)):
        printed = f"{name}: {types[name]} = {pprint.pformat(value, width=110, sort_dicts=True)}\n"
        text, found = re.subn(rf"^{name}: .*?\n(?=\n)", lambda _, printed=printed: printed, text, flags=re.M | re.S)
        if found != 1:
            raise RuntimeError(f"{path}: no single assignment of {name} to replace")
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="print what was found, write nothing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune_triton: no CUDA device here, so there is nothing to tune", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if why := cuda.reason(device):
        print(f"benchmarks.tune_triton: the kernels do not serve this device, because {why}", file=sys.stderr)
        return 2
    _, capability = kernels._device(device)
    entries = dict(
        tune(Device(), kind, order, dtype, capability)
        for kind in ("forward", "backward", "map")
        for order in ("planar", "interleaved")
        for dtype in (torch.bfloat16, torch.float32)
    )
    if not options.dry_run:
        write(Path(triton_table.__file__), capability, entries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
