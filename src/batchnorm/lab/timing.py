"""Contestants take turns; medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

Phases = dict[str, float]
"""Seconds that each phase of one run took."""


def alternate(
    contestants: Mapping[str, Callable[[], Phases]],
    seconds: float,
    least: int = 5,
    most: int = 401,
    pause: float = 0.0,
) -> tuple[dict[str, Phases], int]:
    """Medians over rounds in which every contestant runs once, after one round that does not count.

    Args:
        contestants: each runs once and returns how long its phases took.
        seconds: about how long to go on.
        least: rounds, however long they take.
        most: rounds.
        pause: seconds to wait before each run, and one more that does not count: for contestants with thread
            pools of their own, whose idle threads spin for a while.

    Returns:
        The median of each phase of each contestant in seconds, and the number of rounds.
    """
    for run in contestants.values():
        run()
    rounds: list[dict[str, Phases]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() < end):
        timed = {}
        for name, run in contestants.items():
            if pause:
                time.sleep(pause)
                run()  # its own threads are awake again, and its data where they were
            timed[name] = run()
        rounds.append(timed)
    phases = {
        name: {phase: median(r[name][phase] for r in rounds) for phase in rounds[0][name]} for name in contestants
    }
    return phases, len(rounds)
