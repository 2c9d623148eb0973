"""How the benchmarks let contestants take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from batchnorm.lab.timing import Phases as Phases
from batchnorm.lab.timing import alternate as alternate

PAUSE = 0.02


def both_phases(call: Callable[[], Tensor], dy: Tensor, leaves: Sequence[Tensor]) -> Phases:
    """The times of a forward and of its backward; releasing the results is nobody's."""
    begin = time.perf_counter()
    y = call()
    middle = time.perf_counter()
    y.backward(dy)
    end = time.perf_counter()
    for leaf in leaves:
        leaf.grad = None
    return {"forward": middle - begin, "backward": end - middle, "forward+backward": end - begin}


def rotating(call: Callable[[int], object], count: int, phase: str) -> Callable[[], Phases]:
    """A contestant that calls `call(0)`, `call(1)`, ... `call(count - 1)`, `call(0)`, ..., one a round."""
    turn = 0

    def run() -> Phases:
        nonlocal turn
        begin = time.perf_counter()
        call(turn)
        took = time.perf_counter() - begin
        turn = (turn + 1) % count
        return {phase: took}

    return run
