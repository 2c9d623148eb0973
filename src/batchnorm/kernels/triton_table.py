"""What the Triton kernels' tiling is chosen by, for each kind of device; written by benchmarks/tune_triton.py.

Keys: compute capability ("default": any other), then kind of pass ("forward", "backward", "map"), memory order and
bytes an element.
"""

from __future__ import annotations

from typing import NamedTuple


class Knobs(NamedTuple):
    """Elements and warps of a tile, and the limits between schemes."""

    tile: int = 4096  # elements of a tile that is read in a loop
    warps: int = 4
    single: int = 16384  # most elements of a pool that one program keeps in registers
    each: int = 32  # elements a thread there
    whole: int = 131072  # most bytes of a pool that one program reads twice
    waves: int = 4  # programs for each multiprocessor where a pool is split
    merged: int = 16384  # most bytes of partial results that every program merges for itself
    run: int = 4  # tiles a program where there is nothing to sum


# The device and versions that the entries were measured on; None: nothing was measured, all is a guess.
MEASURED: dict[str, str] = {}

TABLE: dict[str, dict[tuple[str, str, int], Knobs]] = {}


def lookup(capability: str, kind: str, order: str, itemsize: int) -> Knobs:
    """The entry for a device, or the untuned default; a backward and float64 hold more for each element."""
    default = Knobs(tile=2048, single=8192, each=16) if kind == "backward" else Knobs()
    if itemsize == 8:
        default = default._replace(tile=default.tile // 2, single=default.single // 2, each=default.each // 2)
    return TABLE.get(capability, {}).get((kind, order, itemsize), default)
