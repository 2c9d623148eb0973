"""A wait for an engine that has a limit."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from batchnorm.errors import InputError, SynchronizationError

T = TypeVar("T")

TIMEOUT = 3600.0  # seconds


def check_timeout(called: str, timeout: Any) -> float:
    """The limit as a number of seconds above 0."""
    good = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not good or not math.isfinite(timeout) or timeout <= 0:
        raise InputError(f"{called}: got timeout={timeout!r}; expected a finite number of seconds above 0")
    return float(timeout)


def within(timeout: float, what: str, call: Callable[[], T], cancel: Callable[[], object] | None = None) -> T:
    """What `call` returns, if it does so in time.

    Args:
        timeout: seconds.
        what: the subject of the error, such as "Spark".
        call: runs in a thread of its own, since no engine lets itself be waited for with a limit.
        cancel: called at the limit, and on Ctrl-C, to end the work.

    Raises:
        SynchronizationError: the limit has passed.
    """
    result: list[T] = []
    error: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=work, name=f"batchnorm: {what}", daemon=True)
    thread.start()
    try:
        thread.join(timeout)
    except BaseException:
        if cancel is not None:
            cancel()
        raise
    if thread.is_alive():
        if cancel is not None:
            cancel()
        raise SynchronizationError(
            f"{what} did not answer within timeout={timeout:g} seconds, and the work was given up; give a larger "
            "timeout= if it only needs longer"
        )
    if error:
        raise error[0]
    return result[0]
