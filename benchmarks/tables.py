"""Tables out of rows: Markdown, the same for the terminal and for docs/performance.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .rows import Row
from .targets import GPU, NEVER_SLOWER, TARGETS, Target, judge

LIMITS = ("copy", "add")
METRICS = {
    "x_limit": "x {limit}",
    "x_loop": "x the loop",
    "x_torch": "x torch",
    "x_compile": "x torch.compile",
    "of_torch": "of torch's memory",
}


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, marks, *lines])


def _of(rows: Iterable[Row], **columns: Any) -> list[Row]:
    """The rows with figures that have these columns."""
    return [r for r in rows if "absent" not in r and all(r.get(key) == value for key, value in columns.items())]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _judged(rows: Iterable[Row], target: Target) -> list[Row]:
    """The rows under a target."""
    return [r for r in rows if any(t["title"] == target.title and t["metric"] == target.metric for t in judge(r))]


def targets(rows: Sequence[Row], asked_for: Sequence[Target] = (*TARGETS, NEVER_SLOWER)) -> str:
    """Every target beside what was measured: the worst and the best figure of the cases that it covers, and what it
    would be for one that is as fast as the limit."""
    lines = []
    for target in asked_for:
        under = [r for r in _judged(rows, target) if target is NEVER_SLOWER or r["suite"] == target.suite]
        values = sorted((r[target.metric] for r in under), reverse=target.at_most)
        moved = "add" if "backward" in target.title and target not in GPU else "copy"
        limit = under[0].get("limit", moved) if under else moved
        asked = f"{'<=' if target.at_most else '>='} {target.bound:.3g} {METRICS[target.metric].format(limit=limit)}"
        met = sum(target.met(r) for r in under)
        measured = f"{_number(values[0])} to {_number(values[-1])}" if values else "not measured"
        verdict = f"{'yes' if met == len(under) else 'no'}, {met} of {len(under)}" if under else ""
        limits = [r["x_torch"] * r["x_limit"] for r in under if target.metric == "x_torch" and "x_limit" in r]
        possible = f"{_number(min(limits))} to {_number(max(limits))}" if limits and target.suite else ""
        lines.append((target.title, target.suite or "all", asked, measured, verdict, possible))
    return table(("", "figure", "target", "measured, worst to best", "met", "at the limit's speed"), lines)


def kernel(rows: Sequence[Row]) -> str:
    """Times the limit's time, for torch and ours; errors in units in the last place."""
    header = ["shape", "dtype", "order", "direction", "limit, ms", "torch, x limit", "ours, x limit", "ours, x torch"]
    lines = []
    for limit in (r for r in _of(rows, suite="kernel") if r["contestant"] in LIMITS):
        key = {k: limit[k] for k in ("suite", "shape", "dtype", "order", "fusion", "direction")}
        theirs, ours = (next(iter(_of(rows, **key, contestant=name)), {}) for name in ("torch", "ours"))
        figures = (theirs.get("x_limit"), *(ours.get(k) for k in ("x_limit", "x_torch")))
        errors = (theirs.get("error"), ours.get("error"))
        lines.append((*_case(limit), limit["direction"], _number(limit["ms"]), *map(_number, (*figures, *errors))))
    return table((*header, "torch's error", "our error"), lines)


def wall(rows: Sequence[Row]) -> str:
    """Times as fast as torch eager: forward, backward, both."""
    header = (
        "shape", "dtype", "order", "fusion", "contestant", "torch, ms", "forward, x torch", "backward, x torch",
        "both, x torch",
    )  # fmt: skip
    lines = []
    wanted = [r for r in _of(rows, suite="wall") if r["direction"] in ("forward+backward", "inference")]
    for row in (r for r in wanted if r["contestant"] != "torch"):
        key = {k: row[k] for k in ("suite", "shape", "dtype", "order", "fusion")}
        by = {r["direction"]: r.get("x_torch") for r in _of(rows, **key, contestant=row["contestant"])}
        torch_ms = next((r["ms"] for r in _of(rows, **key, contestant="torch", direction=row["direction"])), None)
        fusion = row["fusion"] + (", inference" if row["direction"] == "inference" else "")
        forward = by.get("inference") if row["direction"] == "inference" else by.get("forward")
        rest = (None, None) if row["direction"] == "inference" else (by.get("backward"), by.get("forward+backward"))
        lines.append((*_case(row), fusion, row["contestant"], *map(_number, (torch_ms, forward, *rest))))
    return table(header, lines)


_PHASES = ("forward", "backward", "forward+backward")


def _by_phase(rows: Sequence[Row], suite: str) -> list[tuple[Row, list[str]]]:
    """The cases of a suite, and how many times as fast as torch each phase of ours is."""
    found = []
    for row in _of(rows, suite=suite, contestant="ours fused", direction="forward+backward"):
        key = {k: row[k] for k in ("suite", "shape", "dtype", "order", "fusion", "contestant")}
        by = {r["direction"]: r.get("x_torch") for r in _of(rows, **key)}
        found.append((row, [_number(by.get(phase)) for phase in _PHASES]))
    return found


def activations(rows: Sequence[Row]) -> str:
    """Every activation fused into training: times as fast as torch."""
    header = ("activation", "shape", "dtype", "order", "forward, x torch", "backward, x torch", "both, x torch")
    found = _by_phase(rows, "activations")
    return table(header, [(row["fusion"].removeprefix("bn+"), *_case(row), *figures) for row, figures in found])


def orders(rows: Sequence[Row]) -> str:
    """Inputs and gradients in other orders than results have: times as fast as torch."""
    header = ("order", "shape", "dtype", "ours, ms", "forward, x torch", "backward, x torch", "both, x torch")
    found = _by_phase(rows, "orders")
    return table(
        header, [(r["order"], tuple(r["shape"]), r["dtype"], _number(r["ms"]), *figures) for r, figures in found]
    )


def depthwise(rows: Sequence[Row]) -> str:
    """Depthwise convolutions and the layers around them: times as fast as torch."""
    header = ("layers of", "shape", "kernel, stride", "order", "before", "torch, ms", "apart, x torch",
              *(f"{phase}, x torch" for phase in ("forward", "backward", "both")))  # fmt: skip
    lines = []
    for row in _of(rows, suite="depthwise", contestant="at once", direction="forward+backward"):
        key = {k: row[k] for k in ("suite", "shape", "order", "kernel", "stride", "before", "of")}
        by = {(r["contestant"], r["direction"]): r for r in _of(rows, **key)}
        figures = [by.get(("at once", phase), {}).get("x_torch") for phase in _PHASES]
        apart, theirs = (by.get((name, "forward+backward"), {}) for name in ("ours", "torch"))
        lines.append(
            (row["of"], tuple(row["shape"]), f"{row['kernel']}, {row['stride']}", row["order"],
             "BN" if row["before"] else "", _number(theirs.get("ms")), _number(apart.get("x_torch")),
             *map(_number, figures))
        )  # fmt: skip
    return table(header, lines)


def _whole(row: Row) -> bool:
    return row["suite"] == "layers" and row["direction"] in ("forward+backward", "inference") and "x_torch" in row


def _mode(row: Row) -> str:
    return "inference" if row["direction"] == "inference" else row.get("mode", "training")


def layers(rows: Sequence[Row]) -> str:
    """Layers drawn at random, by what is asked and by dtype: times as fast as torch."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in filter(_whole, rows):
        for key in ((_mode(row), row["dtype"]), (_mode(row), "all"), ("all", "all")):
            found.setdefault(key, []).append(row["x_torch"])
    lines = []
    for (mode, dtype), ratios in sorted(found.items()):
        ratios = sorted(ratios)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        below = (sum(r < 1 for r in ratios), sum(r < 1 / 1.05 for r in ratios))
        lines.append((mode, dtype, len(ratios), *map(_number, (mean, statistics.median(ratios), ratios[0])), *below))
    header = ("asked", "dtype", "layers", "mean, x torch", "median", "worst", "slower", "by more than 5 %")
    return table(header, lines)


def slow_layers(rows: Sequence[Row]) -> str:
    """Those that are slower than torch by more than 5 %."""
    slow = [(row["x_torch"], row) for row in filter(_whole, rows) if row["x_torch"] < 1 / 1.05]
    slow.sort(key=lambda each: each[0])
    lines = [(_mode(row), *_case(row), row["fusion"], _number(row["ms"]), _number(ratio)) for ratio, row in slow]
    header = ("asked", "shape", "dtype", "order", "fusion", "ours, ms", "x torch")
    return table(header, lines) if lines else "None."


def steps(rows: Sequence[Row]) -> str:
    """Training steps: times as fast as torch's layers, and peak memory over theirs."""
    header = ("network", "input", "dtype", "contestant", "step, ms", "x torch", "peak memory, MB", "of torch's")
    lines = []
    for row in _of(rows, suite="step"):
        key = {k: row[k] for k in ("network", "dtype", "contestant")}
        peak: Row = next(iter(_of(rows, suite="memory", **key)), {})
        used = f"{peak['bytes'] / 1e6:.0f}" if peak else ""
        of_torch = f"{peak['of_torch']:.0%}" if peak else ""
        shape = tuple(row["shape"])
        times = (_number(row["ms"]), _number(row.get("x_torch", 1.0)))
        lines.append((row["network"], shape, row["dtype"], row["contestant"], *times, used, of_torch))
    return table(header, lines)


def networks(rows: Sequence[Row]) -> str:
    """Training steps of whole networks: live and resident memory over torch's, times as fast as torch."""
    header = ("network", "input", "contestant", "memory, MB", "of torch's", "x torch", "x torch, processor time")
    lines = []
    for row in _of(rows, suite="networks", direction="forward+backward"):
        figures = (
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['of_torch']:.0%}",
            *map(_number, (row["x_torch"], row["x_torch_processor"])),
        )
        lines.append((row["network"], tuple(row["shape"]), row["contestant"], *figures))
    return table(header, lines)


def alone(rows: Sequence[Row]) -> str:
    """Training steps of a process that does nothing else, times as fast as torch's; page faults."""
    header = ("network", "input", "contestant", "step, ms", "x torch", "page faults a step")
    lines = [
        (
            r["network"], tuple(r["shape"]), r["contestant"], _number(r["ms"]), _number(r["x_torch"]),
            f"{r['faults']:.0f}",
        )
        for r in _of(rows, suite="alone")
    ]  # fmt: skip
    return table(header, lines)


def compiled(rows: Sequence[Row]) -> str:
    """Compiled networks: times as fast as compiled with torch's layers."""
    header = ("input", "network", "contestant", "step, ms", "x torch", "inference, ms", "x torch")
    lines = []
    for step in _of(rows, suite="compiled", direction="step"):
        same = {k: step[k] for k in ("shape", "network", "contestant")}
        inference = _of(rows, suite="compiled", direction="inference", **same)[0]
        figures = (_number(r.get(k, 1.0)) for r in (step, inference) for k in ("ms", "x_torch"))
        lines.append((tuple(step["shape"]), step["network"], step["contestant"], *figures))
    return table(header, lines)


def resident(rows: Sequence[Row]) -> str:
    """Resident memory of a process over that of torch's."""
    header = ("network", "input", "allocator", "contestant", "resident, MB", "of torch's")
    found = [r for r in _of(rows, direction="resident") if r["suite"].startswith("networks")]
    lines = [
        (
            r["network"], tuple(r["shape"]), r["allocator"], r["contestant"], f"{r['bytes'] / 1e6:.0f}",
            f"{r['of_torch']:.0%}",
        )
        for r in found
    ]  # fmt: skip
    return table(header, lines)


def peers(rows: Sequence[Row]) -> str:
    """JAX, and the same under other allocators: times as fast as torch there; BN + ReLU, forward + backward."""
    header = ("shape", "dtype", "order", "allocator", "contestant", "ms", "x torch")
    wanted = [r for suite in ("peers", "allocator") for r in _of(rows, suite=suite, direction="forward+backward")]
    return table(
        header,
        (
            (
                *_case(r), r.get("allocator", "default"), r["contestant"], _number(r["ms"]),
                _number(r.get("x_torch", 1.0)),
            )
            for r in wanted
        ),
    )  # fmt: skip


def absent(rows: Sequence[Row]) -> str:
    """What there is no figure of, and why; each reason once."""
    reasons = dict.fromkeys(f"{r['suite']}, {r['contestant']}: {r['absent']}" for r in rows if "absent" in r)
    return "\n".join(f"- {reason}" for reason in reasons) or "Nothing."


def environment(rows: Sequence[Row]) -> str:
    """What the figures are true for: a line for each machine and set of versions, with all revisions and dates."""
    lines: dict[str, dict[str, None]] = {}
    for r in rows:
        caches = ", ".join(f"{level} {size // 1024} KB" for level, size in r["caches"].items())
        surroundings = (
            f"{r['processor']}, {r['machine_threads']} threads, {caches}; instructions: ours {r['instructions']}, "
            f"torch {r['torch_instructions']}; huge pages: {r['huge_pages']}; torch {r['torch']}, "
            f"Python {r['python']}, batchnorm {r['batchnorm']}{', a quick run' if r['quick'] else ''}"
        )
        lines.setdefault(surroundings, {})[f"{r['revision']} ({r['date'][:10]})"] = None
    return "\n\n".join(f"{line}, at {', '.join(revisions)}." for line, revisions in lines.items())


def slower(rows: Sequence[Row]) -> str:
    """The cases in which ours takes over 5 % longer than torch: defects."""
    header = ("case", "figure", "contestant", "x torch")
    found = [r for r in _judged(rows, NEVER_SLOWER) if not NEVER_SLOWER.met(r)]
    lines = []
    for r in sorted(found, key=lambda r: r["x_torch"]):
        case = r["network"] if "network" in r else tuple(r["shape"])
        words = (str(case), r["dtype"], r.get("order", ""), r.get("fusion", ""), r["direction"])
        lines.append((" ".join(w for w in words if w), r["suite"], r["contestant"], _number(r["x_torch"])))
    return table(header, lines) if lines else "None."


def summary(rows: Sequence[Row]) -> str:
    """For the terminal: the targets, what is slower than torch, what is absent."""
    parts = {"Targets": targets(rows), "Slower than torch": slower(rows), "Absent": absent(rows)}
    return "\n\n".join(f"{title}\n{text}" for title, text in parts.items())


def gpu_targets(rows: Sequence[Row]) -> str:
    """The targets of a GPU beside what was measured there."""
    return targets(rows, GPU)


def gpu(rows: Sequence[Row]) -> str:
    """Every figure of a GPU, by device; and the kernels that torch's calls ran."""
    header = (
        "device", "case", "dtype", "order", "figure", "contestant", "ms", "x copy", "x torch", "x torch.compile",
        "memory, of torch's", "kernels",
    )  # fmt: skip
    lines = []
    for row in (r for r in _of(rows) if r["suite"] in ("gpu", "gpu step")):
        case = row.get("network") or f"{tuple(row['shape'])} {row['fusion']}"
        figure = f"{row['direction']}, {row['figure']}" if "figure" in row else row["direction"]
        ratios = (row.get(key) for key in ("x_limit", "x_torch", "x_compile", "of_torch"))
        names = ", ".join(row.get("kernels", ())) if row["contestant"] == "torch" else ""
        lines.append((
            row["device"], case, row["dtype"], row["order"], figure, row["contestant"], _number(row["ms"]),
            *map(_number, ratios), names,
        ))  # fmt: skip
    return table(header, lines) if lines else "Nothing has been measured."


def gpu_summary(rows: Sequence[Row]) -> str:
    """For the terminal."""
    return f"{gpu(rows)}\n\nTargets\n{gpu_targets(rows)}\n\nAbsent\n{absent(rows)}"


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row["shape"]), row["dtype"], row["order"]


ALONE_BLOCKS = {"alone": alone, "alone environment": environment}
"""Those of steps in processes of their own."""
COMPILED_BLOCKS = {"compiled": compiled, "compiled environment": environment}
"""Those of compiled networks, in docs/performance.md, whose rows are kept by themselves."""

NETWORK_BLOCKS = {"networks": networks, "resident": resident, "networks environment": environment}
"""Those of whole networks' training steps, in docs/performance.md, whose rows are kept by themselves."""

ACTIVATION_BLOCKS = {"activations": activations, "activations environment": environment}
"""Those of all activations, in docs/performance.md, whose rows are kept by themselves."""

ORDER_BLOCKS = {"orders": orders, "orders environment": environment}
"""Those of orders in memory, in docs/performance.md, whose rows are kept by themselves."""

DEPTHWISE_BLOCKS = {"depthwise": depthwise, "depthwise environment": environment}
"""Those of depthwise convolutions, in docs/performance.md, whose rows are kept by themselves."""

LAYER_BLOCKS = {"layers": layers, "slow layers": slow_layers, "layers environment": environment}
"""Those of layers drawn at random, in docs/performance.md, whose rows are kept by themselves."""

GPU_BLOCKS = {"gpu targets": gpu_targets, "gpu": gpu}
"""Those of docs/gpu.md."""

BLOCKS = {
    "environment": environment, "targets": targets, "slower": slower, "kernel": kernel, "wall": wall, "steps": steps,
    "peers": peers, "absent": absent,
}  # fmt: skip
"""The generated parts of the page, by name."""
