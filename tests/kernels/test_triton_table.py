"""The table that the tiling is chosen by, and the script that writes it."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.kernels import triton_table

ROOT = Path(__file__).parents[2]


def test_a_device_without_entries_gets_the_default() -> None:
    assert triton_table.lookup("no such device", "forward", "planar", 2) == triton_table.Knobs()
    assert triton_table.lookup("no such device", "backward", "planar", 2).single < triton_table.Knobs().single


def test_what_was_tuned_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written over the shipped file, and over what it wrote itself."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    from benchmarks import tune_triton

    path = tmp_path / "triton_table.py"
    shutil.copy(triton_table.__file__, path)
    key = ("map", "interleaved", 4)
    for run in (7, 9):
        tune_triton.write(path, "9.0", {key: triton_table.Knobs(run=run)})
        written = runpy.run_path(str(path), init_globals={"Knobs": triton_table.Knobs})
        assert written["MEASURED"]["device"] == "a device"
        assert written["lookup"]("9.0", *key).run == run
        assert written["lookup"]("8.0", *key) == written["Knobs"]()


def test_knobs_are_tried_and_the_fastest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs: a clock stands in that likes tiles of 1,024 elements and nothing else."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu, tune_triton

    class Clock(gpu.Device):
        name = "cpu"

        def cache(self) -> int:
            return 0

        def graph(self, make: Any, warm: bool) -> tuple[Any, int]:
            calls = make()
            for call in calls:
                call()
            return calls, len(calls)

        def seconds(self, run: Any) -> float:
            knobs = triton_table.lookup("untold", *key)
            return 1.0 if knobs.tile == 1024 else 2.0

    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: None)
    monkeypatch.setattr(triton_table, "TABLE", {})
    monkeypatch.setattr(tune_triton, "SHAPES", ((4, 8, 3, 3),))
    monkeypatch.setattr(tune_triton, "DENSE", ((6, 8),))
    for key in (("forward", "planar", 2), ("backward", "interleaved", 4), ("map", "interleaved", 2)):
        kind, order, size = key
        dtype = {2: torch.bfloat16, 4: torch.float32}[size]
        found, best = tune_triton.tune(Clock(), kind, order, dtype, "untold")
        assert found == key
        assert best == triton_table.lookup("another", *key)._replace(tile=1024)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_tuned_and_nothing_printed() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "benchmarks.tune_triton"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not done.stdout
