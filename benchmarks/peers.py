"""Others beside torch: JAX/XLA, and torch under allocators that do not give memory back."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import oracle
from .cases import CONVOLUTIONS, DENSE, EPS, SMALL, Case, draw, grid
from .rows import Row, compare
from .timing import PAUSE, Phases, alternate
from .wall import BOTH, Step
from .wall import measure as measure_wall

NO_JAX = "JAX is not installed: pip install jax"


def jax_cases(quick: bool) -> list[Case]:
    shapes = CONVOLUTIONS[2:3] if quick else (CONVOLUTIONS[0], CONVOLUTIONS[2], DENSE, SMALL[0])
    return grid(shapes, ("float32", "bfloat16"), ("bn+relu",))


def measure_jax(case: Case, seconds: float) -> Iterator[Row]:
    """Forward + backward as one jitted function; its backward alone cannot be had. torch and ours beside it."""
    columns = {"suite": "peers", **case.columns(), "direction": BOTH}
    if importlib.util.find_spec("jax") is None:
        yield {**columns, "contestant": "jax", "absent": NO_JAX}
        return
    columns["jax"] = importlib.metadata.version("jax")
    data = draw(case)
    contestants: dict[str, Any] = {"torch": Step("torch", case, data), "ours fused": Step("ours fused", case, data)}
    contestants["jax"] = _JaxStep(case)
    errors, runs = {}, {}
    for name, contestant in contestants.items():
        try:
            errors[name] = oracle.check(case, name, contestant.result())
        except oracle.WrongResultError as wrong:
            yield {**columns, "contestant": name, "absent": str(wrong)}
        else:
            runs[name] = _both(contestant.run)
    times, rounds = alternate(runs, seconds, pause=PAUSE)
    yield from compare({**columns, "rounds": rounds}, times, errors)


def _both(run: Callable[[], Phases]) -> Callable[[], Phases]:
    return lambda: {BOTH: run()[BOTH]}


class _JaxStep:
    """Batch normalization and relu in jax.numpy, statistics in float32 and in two passes, under jit.

    Channels last is (N, H, W, C) here, as it is in memory.
    """

    def __init__(self, case: Case) -> None:
        import jax
        import jax.numpy as jnp

        data = draw(case)
        self.last = case.order == "channels_last"
        axis = 3 if self.last else 1
        pool = tuple(a for a in range(len(case.shape)) if a != axis)
        along = [1] * len(case.shape)
        along[axis] = -1

        def forward(x: Any, weight: Any, bias: Any) -> Any:
            wide = x.astype(jnp.float32)
            mean, var = wide.mean(pool, keepdims=True), wide.var(pool, keepdims=True)
            z = (wide - mean) / jnp.sqrt(var + EPS) * weight.reshape(along) + bias.reshape(along)
            return jax.nn.relu(z).astype(x.dtype)

        def step(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
            y, pull = jax.vjp(forward, x, weight, bias)
            return y, *pull(dy)

        self.step = jax.jit(step)
        tensors = [data.x, data.weight, data.bias, data.dy]
        self.arguments = [jnp.asarray(self._order(t).float().numpy()) for t in tensors]
        for i in (0, 3):
            self.arguments[i] = self.arguments[i].astype(case.dtype)
        self.block = jax.block_until_ready

    def _order(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous() if self.last and x.ndim == 4 else x

    def run(self) -> Phases:
        begin = time.perf_counter()
        results = self.block(self.step(*self.arguments))
        took = time.perf_counter() - begin
        del results
        return {BOTH: took}

    def result(self) -> dict[str, Tensor]:
        import numpy as np

        y, dx, d_weight, d_bias = (torch.from_numpy(np.array(r, dtype="float32")) for r in self.step(*self.arguments))
        if self.last:
            y, dx = y.permute(0, 3, 1, 2), dx.permute(0, 3, 1, 2)
        return {"y": y, "dx": dx, "weight": d_weight, "bias": d_bias}


def tcmalloc() -> str | None:
    """The path of a tcmalloc that can be preloaded, where one is installed."""
    for name in ("tcmalloc_minimal", "tcmalloc"):
        if found := ctypes.util.find_library(name):
            return next((str(path) for path in Path("/usr/lib").glob(f"*-linux-*/{found}")), None)
    return None


NO_TCMALLOC = "tcmalloc is not installed: on Debian, apt install libtcmalloc-minimal4"


def allocator_cases(quick: bool) -> list[Case]:
    return [
        Case(shape, dtype, "planar", "bn+relu")
        for shape in (CONVOLUTIONS[2:3] if quick else (CONVOLUTIONS[0], CONVOLUTIONS[2]))
        for dtype in ("float32", "bfloat16")
    ]


def measure_allocator(case: Case, seconds: float, allocator: str) -> Iterator[Row]:
    """torch, ours and ours fused, all under the process's allocator."""
    if allocator == "tcmalloc" and "tcmalloc" not in Path("/proc/self/maps").read_text():
        yield {
            "suite": "allocator", **case.columns(), "direction": BOTH, "contestant": "torch", "allocator": allocator,
            "absent": NO_TCMALLOC,
        }  # fmt: skip
        return
    for row in measure_wall(case, ("torch", "ours", "ours fused"), seconds, suite="allocator"):
        yield {**row, "allocator": allocator}
