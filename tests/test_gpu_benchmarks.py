"""The benchmarks for a GPU, with the CPU standing in for the device: rows, ratios, targets and pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import gpu, machine, page, rows, tables, targets

SMALL = (6, 5, 4, 3)


class Stand(gpu.Device):
    """A device whose work is done when it is asked for, and which has used a thousand bytes."""

    name = "cpu"

    def cache(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    def seconds(self, run: gpu.Call) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def graph(self, make: Callable[[], list[gpu.Call]], warm: bool) -> tuple[gpu.Call, int]:
        calls = make()
        return (lambda: [call() for call in calls]), len(calls)

    def kernels(self, run: gpu.Call) -> list[str]:
        run()
        return ["a_kernel"]

    def forget(self) -> None:
        pass

    def peak(self) -> int:
        return 1000

    def columns(self) -> rows.Row:
        return {**machine.environment(), "device": "NVIDIA Stand-in", "implementation": "none", "triton": "none"}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(gpu, "STEP", ((4, 3, 8, 8), 10))
    monkeypatch.setattr(gpu, "cases", lambda quick: [(SMALL, torch.float32, True, "bn+add+relu")])
    steps = gpu.training_steps
    monkeypatch.setattr(gpu, "training_steps", lambda device, rounds: steps(device, 2, network))


@pytest.mark.usefixtures("_small")
def test_a_run_keeps_rows_by_device_and_shows_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.run(True, device=Stand()) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-nvidia-stand-in-quick.jsonl")
    found = rows.read([path])
    figures = {(r["figure"], r["direction"], r["contestant"]) for r in found if r["suite"] == "gpu"}
    names = ("torch", "compile", "ours", "ours fused")
    assert figures == {
        *((f, d, n) for f in ("cold", "warm", "launched") for d in ("forward", "backward") for n in (*names, "copy")),
        *(("wall", "forward+backward", n) for n in names),
    }
    for row in found:
        assert row["device"] == "NVIDIA Stand-in"
        assert row["ms"] > 0
        if row["suite"] == "gpu" and row["contestant"] == "ours fused":
            assert {"x_torch", "x_compile", "error"} <= set(row)
            assert ("x_limit" in row) == (row["figure"] != "wall")
    steps = {r["contestant"]: r for r in found if r["suite"] == "gpu step"}
    assert list(steps) == ["torch", "ours fused", "compile", "ours fused, compiled"]
    assert steps["ours fused"]["of_torch"] == 1
    said = capsys.readouterr().out
    assert "| NVIDIA Stand-in | (6, 5, 4, 3) bn+add+relu | float32 | channels_last | forward, cold | torch |" in said
    assert "a_kernel" in said
    text = (machine.ROOT / "docs" / "gpu.md").read_text()
    filled = page.fill(text, found, tables.GPU_BLOCKS)
    assert "| NVIDIA Stand-in |" in filled
    assert page.fill(filled, [], tables.GPU_BLOCKS) == page.fill(text, [], tables.GPU_BLOCKS)


@pytest.mark.usefixtures("_small")
def test_a_wrong_result_gets_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = gpu.Case._ours

    def wrong(self: gpu.Case, fused: bool) -> Any:
        function = right(self, fused)
        return (lambda x, residual: 1.01 * function(x, residual)) if fused else function

    monkeypatch.setattr(gpu.Case, "_ours", wrong)
    path = tmp_path / "rows.jsonl"
    assert gpu.run(True, path, Stand()) == 1
    found = [r for r in rows.read([path]) if r["suite"] == "gpu" and r["contestant"] == "ours fused"]
    assert len(found) == 1
    assert "no figure" in found[0]["absent"]


@pytest.mark.usefixtures("_small")
def test_a_case_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "measure", lambda case, rounds: 1 / 0)
    path = tmp_path / "rows.jsonl"
    assert gpu.run(True, path, Stand()) == 1
    found = rows.read([path])
    assert "ZeroDivisionError" in found[0]["absent"]
    assert sum(r["suite"] == "gpu step" for r in found) == 4


def test_a_full_run_measures_every_target() -> None:
    judged = set()
    for shape, dtype, _, fusion in gpu.cases(quick=False):
        case = {"suite": "gpu", "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "fusion": fusion}
        for figure, direction in (("cold", "forward"), ("cold", "backward"), ("wall", "forward+backward")):
            row = {**case, "figure": figure, "direction": direction, "contestant": "ours fused"}
            judged |= {(t["title"], t["metric"]) for t in targets.judge({**row, **RATIOS})}
    step = {"suite": "gpu step", "network": "ResNet-50", "shape": [1], "contestant": "ours fused"}
    judged |= {(t["title"], t["metric"]) for t in targets.judge({**step, **RATIOS})}
    assert {(t.title, t.metric) for t in targets.GPU} <= judged


RATIOS = {"x_limit": 1.0, "x_torch": 1.0, "x_compile": 1.0, "of_torch": 1.0}


@pytest.mark.parametrize(("value", "met"), [(0.85, True), (0.86, False)])
def test_memory_is_bounded_above(value: float, met: bool) -> None:
    row = {"suite": "gpu step", "network": "ResNet-50", "shape": [1], "contestant": "ours fused", "of_torch": value}
    assert [t["met"] for t in targets.judge(row)] == [met]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_command_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--suite", "gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
