"""The figures to reach, as data: two cores, medians, side by side in one process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = ("ours", "ours fused")
RECURRENT = ("ours sequence", "ours frame", "ours recurrent")  # which do more than torch's layers


@dataclass(frozen=True)
class Target:
    """A bound on one column of the rows whose columns have one of the values in `where`."""

    title: str
    suite: str
    metric: str
    bound: float
    where: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def at_most(self) -> bool:
        """Multiples of the limit's time are bounded above, speedups below."""
        return self.metric in ("x_limit", "of_torch")

    def covers(self, row: Mapping[str, Any]) -> bool:
        if row["suite"] != self.suite or row.get("contestant") not in OURS + RECURRENT or self.metric not in row:
            return False
        return all(row.get(column) in values for column, values in self.where.items())

    def met(self, row: Mapping[str, Any]) -> bool:
        value = row[self.metric]
        return bool(value <= self.bound if self.at_most else value >= self.bound)


def _group(title: str, where: Mapping[str, tuple[Any, ...]], *bounds: tuple[str, str, float]) -> list[Target]:
    """One line of the table: bounds are suite, metric, value."""
    return [Target(title, suite, metric, bound, where) for suite, metric, bound in bounds]


def _plain(
    direction: str,
    dtype: str,
    orders: tuple[str, ...],
    limit: float | None = None,
    kernel: float = 0,
    wall: float = 0,
) -> list[Target]:
    """Batch norm alone, of all but small tensors: at most `limit` x a copy, at least `kernel` and `wall` x torch."""
    title = f"{direction}, {' and '.join(_SHOWN[order] for order in orders)} {dtype}"
    where = {"direction": (direction,), "dtype": (dtype,), "order": orders, "fusion": ("bn",), **_LARGE, **_UNFUSED}
    bounds = [("kernel", "x_torch", kernel), ("wall", "x_torch", wall)]
    return _group(title, where, *([("kernel", "x_limit", limit)] if limit else []), *bounds)


_SHOWN = {"planar": "planar", "channels_last": "channels_last", "dense": "(8192,1024)"}
_LARGE, _SMALL = {"small": (False,)}, {"small": (True,)}
_UNFUSED, _FUSED = {"contestant": ("ours",)}, {"contestant": ("ours fused",)}
_BOTH = {"direction": ("forward+backward",)}
_INFERENCE = {"direction": ("inference",), "fusion": ("bn+relu",), **_LARGE}

TARGETS = (
    *_plain("forward", "float32", ("planar",), 1.3, 4, 3),
    *_plain("backward", "float32", ("planar",), 1.6, 1.5, 1.5),
    *_plain("forward", "float32", ("channels_last", "dense"), 1.6, 1.4, 1.8),
    *_plain("backward", "float32", ("channels_last", "dense"), 1.8, 1.8, 1.8),
    *_plain("forward", "bfloat16", ("planar",), None, 3, 2.5),
    *_plain("backward", "bfloat16", ("planar",), None, 2, 2.5),
    *_plain("forward", "bfloat16", ("channels_last",), None, 1.8, 2),
    *_plain("backward", "bfloat16", ("channels_last",), None, 2, 2),
    *_group(
        "BN + ReLU and BN + add + ReLU, forward + backward",
        {**_BOTH, **_LARGE, **_FUSED, "fusion": ("bn+relu", "bn+add+relu")},
        ("wall", "x_torch", 3),
        ("wall", "x_compile", 5),
    ),
    *_group("inference with activation", {**_INFERENCE, **_UNFUSED}, ("kernel", "x_limit", 1.1)),
    *_group("inference with activation", {**_INFERENCE, **_FUSED}, ("wall", "x_torch", 1.5)),
    *_group(
        "(64,32) and (256,256) BN + ReLU, forward + backward",
        {**_BOTH, **_SMALL, **_FUSED, "fusion": ("bn+relu",), "dtype": ("float32",)},
        ("wall", "x_torch", 1.3),
    ),
    *_group(
        "ResNet-18 training step, bfloat16 channels_last",
        {"network": ("resnet18",), "dtype": ("bfloat16",), **_FUSED},
        ("step", "x_torch", 1.2),
    ),
    *_group(
        "ResNet-18 training step, float32",
        {"network": ("resnet18",), "dtype": ("float32",), **_FUSED},
        ("step", "x_torch", 1.08),
    ),
    *_group("calibrate, beside forward passes in training mode", {}, ("calibrate", "x_limit", 1.1)),
    *_group(
        "LSTM training step with batch_norm='sequence'",
        {"cell": ("LSTM",), "shape": ([100, 64, 128],), "contestant": ("ours sequence",)},
        ("recurrent", "x_torch", 1 / 1.25),
        ("recurrent", "x_loop", 5),
    ),
    *_group(
        "LSTM training step with recurrent=True",
        {"cell": ("LSTM",), "shape": ([100, 64, 128],), "contestant": ("ours recurrent",)},
        ("recurrent", "x_torch", 1 / 2.5),
        ("recurrent", "x_loop", 5),
    ),
)


def _gpu(direction: str, fusion: str, *bounds: tuple[str, float]) -> list[Target]:
    """bfloat16 on an H200 over buffers beyond its cache, the two large shapes, contiguous and channels_last."""
    where = {
        "direction": (direction,), "fusion": (fusion,), "dtype": ("bfloat16",), "figure": ("cold",), **_FUSED,
        "shape": ([32, 256, 56, 56], [32, 64, 112, 112]),
    }  # fmt: skip
    return _group(f"{direction}, {fusion}, bfloat16", where, *(("gpu", metric, bound) for metric, bound in bounds))


GPU = (
    *_gpu("forward", "bn+relu", ("x_limit", 1 / 0.70), ("x_torch", 1.5), ("x_compile", 1.1)),
    *_gpu("backward", "bn+relu", ("x_limit", 1 / 0.42), ("x_torch", 1.5), ("x_compile", 1.05)),
    *_gpu("forward", "bn+add+relu", ("x_torch", 2)),
    *_gpu("backward", "bn+add+relu", ("x_torch", 1.5)),
    *_group(
        "(256,256) forward + backward, wall time",
        {**_BOTH, "figure": ("wall",), "shape": ([256, 256],), "fusion": ("bn+relu",), **_FUSED},
        ("gpu", "x_torch", 1),
    ),
    *_group("ResNet-50 step, AMP channels_last", _FUSED, ("gpu step", "x_torch", 1.15), ("gpu step", "of_torch", 0.85)),
)
"""Of `--suite gpu`, on an H200."""

NEVER_SLOWER = Target("never slower than torch by more than 5 %", "", "x_torch", 1 / 1.05)
"""Holds for every row of ours, whatever else is asked of it."""


def judge(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets that a row is under: title, metric, bound, met."""
    row = {**row, "small": _is_small(row)}
    found = [target for target in (*TARGETS, *GPU) if target.covers(row)]
    if row.get("contestant") in OURS and "x_torch" in row:
        found.append(NEVER_SLOWER)
    return [{"title": t.title, "metric": t.metric, "bound": t.bound, "met": t.met(row)} for t in found]


def _is_small(row: Mapping[str, Any]) -> bool:
    """Where the call's overhead decides, and not the memory."""
    return math.prod(row.get("shape", ())) <= 1 << 16
