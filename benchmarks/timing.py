"""How the benchmarks let contestants take turns."""

from __future__ import annotations

import time
from collections.abc import Callable

from batchnorm.lab.timing import Phases as Phases
from batchnorm.lab.timing import alternate as alternate

PAUSE = 0.02


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
