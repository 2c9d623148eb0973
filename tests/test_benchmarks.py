"""The benchmarks: no figure for a wrong result, ratios and targets as defined, tables that say what rows say."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import reference
from batchnorm.kernels import cpu
from batchnorm.nn.step_batch_norm import StepBatchNorm
from benchmarks import __main__ as command
from benchmarks import (
    calibration,
    compiled,
    depthwise,
    growth,
    kernels,
    layers,
    machine,
    oracle,
    page,
    recurrent,
    rows,
    sequences,
    steps,
    suites,
    tables,
    targets,
    timing,
    wall,
    whole,
)
from benchmarks.cases import FUSIONS, LYING, Case, draw, grid

ROOT = Path(__file__).parent.parent
SMALL = (6, 5, 4, 3)
native = pytest.mark.skipif(not cpu.available(), reason="needs the native library")


def result_of(case: Case, name: str = "torch") -> dict[str, torch.Tensor]:
    return wall.Step(name, case, draw(case)).result()


# The gate


@pytest.mark.parametrize("case", grid([SMALL, (40, 7)], ("float32", "bfloat16"), FUSIONS), ids=str)
@pytest.mark.parametrize("name", ["torch", "ours", "ours fused"])
def test_right_results_pass(case: Case, name: str):
    assert oracle.check(case, name, result_of(case, name)) <= oracle.LIMIT


@pytest.mark.parametrize("name", ["torch", "ours"])
@pytest.mark.parametrize("key", ["y", "dx", "residual", "weight", "bias"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_wrong_element_does_not(name: str, key: str, fusion: str):
    case = Case((64, 5, 4, 3), fusion=fusion)
    result = result_of(case)
    if key not in result:
        pytest.skip("no such gradient")
    # Where relu is on and far from its kink, so that only one value is right.
    at = result["y"].flatten().argmax() if key not in ("weight", "bias") else 2
    result[key] = result[key].detach().clone()
    result[key].view(-1)[at] += 0.05 * (1 + result[key].abs().max())
    with pytest.raises(oracle.WrongResultError, match=rf"{name}: {key} is off by .* no figure"):
        oracle.check(case, name, result)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_does_not(wrong: float):
    result = result_of(Case(SMALL))
    result["dx"][3, 2, 1, 0] = wrong
    with pytest.raises(oracle.WrongResultError, match="dx"):
        oracle.check(Case(SMALL), "torch", result)


def test_another_shape_does_not():
    y = result_of(Case(SMALL))["y"]
    with pytest.raises(oracle.WrongResultError, match="y is off by inf"):
        oracle.check(Case(SMALL), "ours", {"y": y[:, :, :1]})


def test_population_statistics_are_told_from_the_batch_s():
    case = Case(SMALL, fusion="bn+relu")
    y = wall.Inference("ours fused", case, draw(case)).result()
    assert oracle.check(case, "ours fused", y, population=True) <= oracle.LIMIT
    with pytest.raises(oracle.WrongResultError):
        oracle.check(case, "ours fused", y)


def test_the_unbiased_variance_is_not_batch_normalization():
    case = Case(SMALL)
    data = draw(case)
    var, mean = torch.var_mean(data.x, (0, 2, 3), correction=1)
    y = nn.functional.batch_norm(data.x, mean, var, data.weight, data.bias)
    with pytest.raises(oracle.WrongResultError):
        oracle.check(case, "torch", {"y": y})


@pytest.mark.parametrize("mode", ["training", "inference", "frozen"])
def test_a_wrong_module_gets_no_figure(monkeypatch: pytest.MonkeyPatch, mode: str):
    right = wall.module

    def forgets_beta(name, case, data):
        module = right(name, case, data)
        if name == "ours":
            nn.init.zeros_(module.norm.bias)
        return module

    monkeypatch.setattr(wall, "module", forgets_beta)
    case = Case(SMALL, fusion="bn+relu")
    found = list(wall.measure(case, ("torch", "ours", "ours fused"), 0, mode=mode))
    assert {r["contestant"] for r in found if "ms" in r} == {"torch", "ours fused"}
    (absent,) = (r for r in found if "absent" in r)
    assert absent["contestant"] == "ours"
    assert "no figure" in absent["absent"]


@native
def test_a_wrong_kernel_gets_no_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "cache_bytes", lambda: 0)
    monkeypatch.setattr(kernels.Kernels, "torch_forward", kernels.Kernels.copy)
    found = list(kernels.measure(Case(SMALL), ("forward",), 0))
    assert [r["contestant"] for r in found if "ms" in r] == ["copy", "ours"]
    assert not any("x_torch" in r for r in found)
    assert "y is off" in found[-1]["absent"]


# Rows

COLUMNS = {"suite", "shape", "dtype", "order", "fusion", "direction", "contestant", "ms", "rounds", "targets"}


@native
def test_kernel_rows():
    found = list(kernels.measure(Case(SMALL), ("forward", "backward"), 0))
    found += kernels.measure(Case(SMALL, "bfloat16", "channels_last", "bn+relu"), ("inference",), 0)
    names = [(r["direction"], r["contestant"]) for r in found]
    assert names == [
        (direction, name)
        for direction, limit in (("forward", "copy"), ("backward", "add"), ("inference", "copy"))
        for name in (limit, "torch", "ours")
    ]
    for row in found:
        assert row.keys() >= COLUMNS
        assert row["ms"] > 0
        has_limit = row["contestant"] not in tables.LIMITS
        assert ("x_limit" in row, "error" in row) == (has_limit, has_limit)
        assert ("x_torch" in row) == (row["contestant"] == "ours")
    assert json.loads(json.dumps(found)) == found


def test_wall_rows():
    found = list(wall.measure(Case(SMALL, fusion="bn+add+relu"), ("torch", "ours fused"), 0))
    assert all(row.keys() >= COLUMNS for row in found)
    assert {(r["contestant"], r["direction"]) for r in found} == {
        (name, phase) for name in ("torch", "ours fused") for phase in ("forward", "backward", wall.BOTH)
    }


def test_growth_rows_tell_threads_and_leave_them_as_they_were():
    before = torch.get_num_threads()
    found = list(growth.measure("C", Case(SMALL, fusion="bn+relu", threads=before + 1), 0))
    assert {(r["axis"], r["threads"], r["direction"]) for r in found} == {("C", before + 1, wall.BOTH)}
    assert torch.get_num_threads() == before


def test_the_environment_is_a_key():
    wanted = {"date", "revision", "processor", "caches", "threads", "python", "torch", "batchnorm", "instructions"}
    assert machine.environment().keys() >= wanted
    assert json.dumps(machine.environment())


def test_ratios():
    times = {"copy": {"forward": 2.0}, "torch": {"forward": 6.0}, "ours": {"forward": 3.0}}
    copy, theirs, ours = rows.compare({"suite": "kernel"}, times, {"torch": 1.0, "ours": 0.5}, limit="copy")
    assert (theirs["x_limit"], ours["x_limit"], ours["x_torch"]) == (3, 1.5, 2)
    assert (copy["ms"], ours["ms"], ours["limit"], ours["error"]) == (2000, 3000, "copy", 0.5)
    assert not copy.keys() & {"x_limit", "x_torch", "error"}
    assert "x_torch" not in theirs


def test_contestants_take_turns_and_the_median_counts():
    order, waits = [], {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 4.0, 4.0, 7.0])}

    def contestant(name: str):
        def run() -> dict[str, float]:
            order.append(name)
            return {"forward": next(waits[name])}

        return run

    times, rounds = timing.alternate({name: contestant(name) for name in waits}, seconds=0, least=3)
    assert "".join(order) == "ab" * 4
    assert (times, rounds) == ({"a": {"forward": 2.0}, "b": {"forward": 4.0}}, 3)


def test_buffers_are_rotated():
    seen: list[int] = []
    run = timing.rotating(seen.append, 3, "forward")
    for _ in range(5):
        assert run()["forward"] >= 0
    assert seen == [0, 1, 2, 0, 1]


def test_calibration_has_a_figure_only_for_right_statistics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(calibration.SAMPLES, "mlp", 600)
    forward, ours = calibration.measure("mlp", "torch", 0.01)
    assert (forward["contestant"], ours["contestant"], ours["limit"]) == ("forward", "ours", "forward")
    assert 0 < ours["error"] < 1e-6
    monkeypatch.setattr("batchnorm.calibrate", lambda net, batches: net)
    (absent,) = calibration.measure("mlp", "torch", 0.01)
    assert "off by" in absent["absent"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"suite": "wall"}\n{"suite": "ker')
    assert rows.read([path]) == [{"suite": "wall"}]


# Targets


def plan() -> list[rows.Row]:
    """What a full run measures, with figures of 1."""
    planned = []
    for case, directions in kernels.cases(quick=False):
        for direction in directions:
            planned.append({"suite": "kernel", **case.columns(), "direction": direction, "contestant": "ours"})
    for case, names, mode in wall.cases(quick=False):
        for direction in (mode,) if mode == "inference" else ("forward", "backward", wall.BOTH):
            for name in names:
                row = {"suite": "wall", **case.columns(), "direction": direction, "contestant": name}
                planned.append({**row, "x_compile": 1.0} if "compile" in names else row)
    for network in steps.NETWORKS:
        for dtype in ("float32", "bfloat16"):
            shape = list(steps.NETWORKS[network][1])
            row = {"suite": "step", "network": network, "dtype": dtype, "shape": shape, "order": "planar"}
            planned += [{**row, "direction": "step", "contestant": name} for name in steps.NORMS]
    for cell, size, axis in recurrent.cases(quick=False):
        row = {"suite": "recurrent", "cell": cell, "shape": list(size.shape), "dtype": "float32", "axis": axis}
        planned += [{**row, "direction": "step", "x_loop": 1.0, "contestant": name} for name in recurrent.FORMS]
    for network, norm in product(calibration.SAMPLES, ("torch", "ours fused")):
        planned.append({"suite": "calibrate", "network": network, "norm": norm, "contestant": "ours"})
    shared = {"ms": 1.0, "x_torch": 1.0, "x_limit": 1.0, "limit": "copy", "rounds": 5, **machine.environment()}
    return [{**shared, "quick": False, **row} for row in planned]


def test_of_several_runs_the_one_in_the_middle_stands():
    def run(date: str, forward: float, backward: float, suite: str = "wall", shape: int = 8) -> list[dict]:
        case = {"suite": suite, "date": date, "shape": [shape], "dtype": "float32", "order": "dense", "fusion": "bn"}
        speeds = {"forward": forward, "backward": backward}
        ours = [{**case, "direction": d, "contestant": "ours", "x_torch": x} for d, x in speeds.items()]
        return [{**case, "direction": "forward", "contestant": "torch"}, *ours]

    runs = [run("1", 0.7, 1.0), run("2", 1.2, 1.1), run("3", 3.0, 2.0)]
    for order in itertools.permutations(runs):
        assert rows.settled(itertools.chain(*order)) == runs[1]
    assert rows.settled([*runs[2], *runs[0]]) == runs[0]  # of two the slower
    others = run("1", 2.0, 2.0, shape=9) + run("1", 2.0, 2.0, suite="pools") + run("2", 3.0, 3.0, suite="pools")
    assert rows.settled([*runs[1], *others]) == [*runs[1], *others]


def test_the_full_run_measures_every_target_and_every_case_once():
    judged = {(t["title"], t["metric"], r["suite"]) for r in plan() for t in targets.judge(r)}
    assert {(t.title, t.metric, t.suite) for t in targets.TARGETS} <= judged
    keys = [json.dumps({k: v for k, v in r.items() if k != "x_compile"}) for r in plan()]
    assert len(keys) == len(set(keys))


def test_the_plan_has_the_shapes_dtypes_and_orders_that_were_asked_for():
    for suite in ("kernel", "wall"):
        shapes = {tuple(r["shape"]) for r in plan() if r["suite"] == suite and r["direction"] != "inference"}
        assert shapes == {
            (32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7), (8192, 1024), (256, 256),
            (64, 32),
        }  # fmt: skip


@pytest.mark.parametrize(("metric", "value", "met"), [("x_limit", 1.3, True), ("x_limit", 1.31, False)])
def test_the_limit_bounds_above(metric: str, value: float, met: bool):
    row = {"suite": "kernel", **Case((32, 64, 112, 112)).columns(), "direction": "forward", "contestant": "ours"}
    assert [t["met"] for t in targets.judge({**row, metric: value})] == [met]


@pytest.mark.parametrize(("value", "met"), [(4.0, [True, True]), (3.9, [False, True]), (0.9, [False, False])])
def test_speedups_bound_below_and_nothing_may_be_slower(value: float, met: list[bool]):
    row = {"suite": "kernel", **Case((32, 64, 112, 112)).columns(), "direction": "forward", "contestant": "ours"}
    assert [t["met"] for t in targets.judge({**row, "x_torch": value})] == met
    assert targets.judge({**row, "contestant": "torch", "x_torch": value}) == []


def test_the_table_of_targets_counts():
    case = {"suite": "kernel", "direction": "forward", "contestant": "ours", "limit": "copy"}
    shapes = [(32, 64, 112, 112), (32, 256, 56, 56)]
    made = [{**case, **Case(s).columns(), "x_limit": x} for s, x in zip(shapes, (1.25, 1.5), strict=True)]
    line = "| forward, planar float32 | kernel | <= 1.3 x copy | 1.5 to 1.25 | no, 1 of 2 |  |"
    assert line in tables.targets(made).splitlines()
    assert "| forward, planar float32 | wall | >= 3 x torch | not measured |  |  |" in tables.targets(made)


def test_the_table_of_targets_says_what_the_limit_itself_would_reach():
    row = {
        "suite": "kernel",
        "direction": "forward",
        "contestant": "ours",
        "limit": "copy",
        "x_limit": 1.5,
        "x_torch": 3.0,
    }
    made = [{**row, **Case((32, 256, 56, 56)).columns()}]
    line = "| forward, planar float32 | kernel | >= 4 x torch | 3 to 3 | no, 0 of 1 | 4.5 to 4.5 |"
    assert line in tables.targets(made).splitlines()


def test_what_is_slower_than_torch_is_listed():
    row = {"suite": "wall", **Case(SMALL).columns(), "direction": "forward", "contestant": "ours"}
    assert tables.slower([{**row, "x_torch": 1.0}]) == "None."
    assert "| (6, 5, 4, 3) float32 planar bn forward | wall | ours | 0.8 |" in tables.slower([{**row, "x_torch": 0.8}])


# The page


def test_the_page_has_every_block_and_they_are_made_anew():
    text = (ROOT / "docs" / "performance.md").read_text()
    filled = page.fill(text, plan())
    assert "| (32, 64, 112, 112) | float32 | planar | bn+add+relu | ours fused |" in filled
    assert page.fill(filled, plan()) == filled
    with pytest.raises(ValueError, match="targets"):
        page.fill(text.replace("<!-- targets -->", ""), plan())


def test_every_plot_is_drawn_from_rows_and_none_without(tmp_path: Path):
    pytest.importorskip("matplotlib")
    sweep = {
        "suite": "growth",
        **Case(SMALL, fusion="bn+relu").columns(),
        "contestant": "torch",
        "direction": wall.BOTH,
    }
    some = [{**sweep, "ms": 1.0, "axis": axis, "threads": n} for axis in growth.SWEEPS for n in (1, 2)]
    some += [{**r, "suite": "allocator", "allocator": "thp"} for r in plan() if r["suite"] == "wall"]
    written = page.draw(plan() + some, tmp_path)
    assert {path.stem for path in written} == set(page.DRAWINGS)
    for path in written:
        assert ET.parse(path).getroot().tag.endswith("svg")
        assert f"](performance/{path.name})" in (ROOT / "docs" / "performance.md").read_text()
    assert page.draw([{"suite": "peers", "contestant": "jax", "absent": "not installed"}], tmp_path) == []


# Recurrent layers


def test_recurrent_rows(monkeypatch: pytest.MonkeyPatch):
    made = list(recurrent.measure("LSTM", recurrent.Size(4, 3, 32), "steps", 0.0))
    assert [row["contestant"] for row in made] == [
        *("torch", *recurrent.FORMS, *recurrent.LOOPS, recurrent.HOISTED, recurrent.PRODUCTS)
    ]
    by = {row["contestant"]: row for row in made}
    assert by["ours sequence"]["x_loop"] == pytest.approx(by["loop sequence"]["ms"] / by["ours sequence"]["ms"])
    assert not any(row["targets"] for row in made)  # which are those of the full size
    monkeypatch.setattr(recurrent, "agree", lambda cell: dict.fromkeys(["torch", *recurrent.FORMS], 1e-2))
    assert all("no figure" in row["absent"] for row in recurrent.measure("GRU", recurrent.Size(4, 3, 32), None, 0.0))


def row_of(form: str, seed: int, accuracy: float):
    row = {"experiment": "accuracy", "data": "mnist5k", "form": form, "rate": 0.001, "seed": seed}
    return {**row, "accuracy": accuracy, "accuracy_at_quarter": accuracy / 2}


def test_the_evidence_s_tables_tell_losses_and_ties():
    ours = {0: 0.90, 1: 0.92, 2: 0.91}
    assert sequences.verdict(ours, {0: 0.80, 1: 0.83, 2: 0.81}) == "win"
    assert sequences.verdict({0: 0.80, 1: 0.83, 2: 0.81}, ours) == "loss"
    assert sequences.verdict(ours, {0: 0.91, 1: 0.91, 2: 0.91}) == "tie"
    made = [row_of(form, seed, 0.9 + 0.01 * seed) for form in sequences.FORMS for seed in range(3)]
    made += [{**row, "rate": 0.01} for row in made]
    line = "| 0.001 | sequence | 45.5 ± 0.5 | 91.0 ± 1.0 | tie |"
    assert line in sequences.accuracy_table(made, "mnist5k").splitlines()


def test_shared_statistics_are_those_of_all_frames():
    norm = StepBatchNorm(2, max_steps=4, momentum=None, running_var="biased", dtype=torch.float64)
    frames = [torch.randn(n, 2, dtype=torch.float64) * (t + 1) for t, n in enumerate((5, 4, 3))]
    norm(torch.cat(frames), [5, 4, 3])
    sequences.share(norm, torch.tensor([5, 4, 3, 0]))
    whole = torch.cat(frames)
    torch.testing.assert_close(norm.running_mean[2], whole.mean(0))
    torch.testing.assert_close(norm.running_var[0], whole.var(0, correction=0))


# The command


def test_every_suite_has_jobs_and_the_quick_ones_are_fewer():
    for name, suite in suites.SUITES.items():
        assert 0 < len(suite.jobs(True)) <= len(suite.jobs(False)), name


@pytest.mark.parametrize(("outcome", "code"), [([], 0), (["kernel: ended with code 1"], 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, outcome, code: int):
    def run(names, quick, path):
        path.write_text('{"suite": "peers", "contestant": "jax", "absent": "not installed"}\n')
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(command, "run", run)
    path = tmp_path / "rows.jsonl"
    assert command.main(["--quick", "--out", str(path)]) == code
    assert len(rows.read([path])) == 1  # what there was before the interruption is kept
    said = capsys.readouterr()
    assert ("peers, jax: not installed" in said.out) == (code != 130)


def test_a_suite_in_a_process_of_its_own_keeps_rows_and_names_failures(tmp_path: Path, monkeypatch):
    from benchmarks import run

    worker = tmp_path / "fake.py"
    worker.write_text(
        "import json, sys\n"
        "lines = {'jobs': 2}, {'row': {'suite': 'wall'}}, {'done': 1}, {'failed': 'case 2'}\n"
        "print(*map(json.dumps, lines), sep='\\n')\n"
        "sys.exit('out of memory')\n"
    )
    popen = run.subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, **options: popen([command[0], str(worker)], **options))
    path = tmp_path / "results" / "rows.jsonl"
    failures = run.run(["wall"], True, path)
    assert rows.read([path]) == [{"suite": "wall"}]
    assert failures == ["case 2", "wall: ended with code 1: out of memory"]


@pytest.mark.parametrize("network", ["resnet18", "mobilenet", "mlp"])
def test_networks_have_the_same_gradients_with_any_batch_norm(network: str):
    shape = {"mlp": (16, 256)}.get(network, (4, 3, 33, 33))
    true, theirs, ours = (
        steps.TrainingStep(network, name, dtype, shape).gradients()
        for name, dtype in (("torch", torch.float64), ("torch", torch.float32), ("ours fused", torch.float32))
    )
    assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-6 * true.norm()


def test_a_network_with_worse_gradients_gets_no_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "error", lambda network, name, dtype: 1.0 if name == "ours" else 1e-6)
    monkeypatch.setattr(steps, "TrainingStep", lambda *_: type("Step", (), {"run": lambda self: None})())
    found = list(steps.measure("mlp", "float32", 0))
    assert {r["contestant"] for r in found if "ms" in r} == {"torch", "ours fused"}
    assert [r["contestant"] for r in found if "absent" in r] == ["ours"]


def test_networks_are_measured_in_live_bytes_and_shown():
    """A step that allocates a known tensor and frees it; the rows' figures come back out of the tables."""
    net = nn.Linear(3, 2)

    def run() -> None:
        net.zero_grad(set_to_none=True)
        held = torch.empty(1 << 20)
        net(torch.ones(1, 3)).sum().backward()
        del held

    run()
    net.zero_grad(set_to_none=True)
    assert 4 << 20 <= whole.live_bytes(run, net) < (4 << 20) + 4096
    columns = {"suite": "networks", "network": "some_net", "shape": [2, 3], "contestant": "saving"}
    step = {
        "direction": "forward+backward",
        "bytes": 1234567,
        "of_torch": 0.4,
        "x_torch": 1.5,
        "x_torch_processor": 1.25,
    }
    found = [
        {**columns, **step},
        {**columns, "direction": "resident", "allocator": "glibc", "bytes": 2e6, "of_torch": 0.5},
    ]
    assert "| some_net | (2, 3) | saving | 1.2 | 40% | 1.5 | 1.25 |" in tables.networks(found)
    assert "| some_net | (2, 3) | glibc | saving | 2 | 50% |" in tables.resident(found)
    apart = {
        **columns,
        "suite": "alone",
        "contestant": "torch, memory reused",
        "ms": 20.0,
        "x_torch": 1.25,
        "faults": 7.5,
    }
    assert "| some_net | (2, 3) | torch, memory reused | 20 | 1.25 | 8 |" in tables.alone([apart])


def test_the_table_of_compiled_networks_has_steps_beside_inference():
    columns = {"suite": "compiled", "shape": [2, 3], "network": "8 layers", "contestant": "ours fused"}
    rows = [
        {**columns, "direction": "step", "ms": 4.0, "x_torch": 1.25},
        {**columns, "direction": "inference", "ms": 2.0, "x_torch": 0.5},
    ]
    assert "| (2, 3) | 8 layers | ours fused | 4 | 1.25 | 2 | 0.5 |" in tables.compiled(rows)


@pytest.mark.slow
def test_compiled_networks_are_measured_beside_torchs():
    rows = list(compiled.measure((16, 8), 2, 0.05))
    assert [row["contestant"] for row in rows] == 2 * list(compiled.CONTESTANTS)
    assert all(row["ms"] > 0 for row in rows)
    assert {row["contestant"] for row in rows if "x_torch" in row} == {"ours fused", "ours fused, eager", "none"}


@pytest.mark.skipif(whole.torchvision() is None, reason=whole.NO_TORCHVISION)
def test_contestants_of_a_process_of_their_own_are_what_they_are_called(capsys):
    for name in whole.ALONE:
        step = whole.Step("mobilenet_v2", name, (2, 3, 32, 32))
        first = step.net.get_submodule("features.0.0").weight
        assert first.is_contiguous(memory_format=torch.channels_last) is ("channels last" in name)
        assert isinstance(step.net.get_submodule("features.0.1"), batchnorm.BatchNorm2d) is name.startswith(
            "accelerated"
        )
    whole.alone_here("mobilenet_v2", "accelerated", 0.0)
    steps = json.loads(capsys.readouterr().out)
    assert len(steps) == 3
    assert all(ms > 0 and faults >= 0 for ms, faults in steps)


def test_activations_are_measured_and_shown():
    case = Case((4, 8, 6, 6), "float32", "planar", "bn+hardswish")
    assert (case.activation, case.adds) == ("hardswish", False)
    assert Case((4, 8), fusion="bn+add").activation is None
    rows = list(wall.measure(case, ("torch", "ours fused"), 0.01, "activations"))
    assert {row["contestant"] for row in rows} == {"torch", "ours fused"}
    shown = tables.activations(rows)
    assert "| hardswish | (4, 8, 6, 6) | float32 | planar |" in shown
    for activation in wall.ACTIVATIONS:
        found = wall.Apart(nn.Identity(), activation)(torch.linspace(-4, 7, 30))
        true = reference.activation(np.linspace(-4, 7, 30), activation)
        np.testing.assert_allclose(found.numpy(), true, atol=1e-6)


def test_orders_are_what_they_are_called_and_shown():
    found = {case.order for case in wall.order_cases(False)}
    assert found == set(LYING)
    rows = []
    for order in LYING:
        case = Case((4, 8, 6) if "dy" not in order else (4, 8, 6, 6), "float32", order, "bn+relu")
        data = draw(case)
        if order == "sequences":
            assert all(t.transpose(1, 2).is_contiguous() for t in (data.x, data.dy))
        elif order == "time first":
            assert all(t.permute(2, 0, 1).is_contiguous() for t in (data.x, data.dy))
        else:
            lies = [t.is_contiguous(memory_format=torch.channels_last) for t in (data.x, data.dy)]
            assert lies == [order.startswith("channels_last"), order.endswith("channels_last")]
        torch.testing.assert_close(data.x.contiguous(), draw(Case(case.shape)).x)
        rows += wall.measure(case, ("torch", "ours fused"), 0.01, "orders")
    assert not any("absent" in row for row in rows)
    for order in LYING:
        assert f"| {order} | (4, 8, 6" in tables.orders(rows)


def test_layers_are_drawn_again_by_their_seed_and_shown():
    drawn = layers.cases(3, 40)
    assert drawn == layers.cases(3, 40)
    assert drawn != layers.cases(4, 40)
    assert {mode for _, mode in drawn} == set(layers.MODES)
    assert {len(case.shape) for case, _ in drawn} == {2, 3, 4, 5}
    of_each_mode = {mode: case for case, mode in layers.cases(0, 300) if case.bytes < 1 << 16}
    rows = [
        row
        for mode, case in of_each_mode.items()
        for row in wall.measure(case, ("torch", "ours fused"), 0.01, "layers", mode)
    ]
    assert not any("absent" in row for row in rows)
    shown = tables.layers(rows)
    assert "| all | all | 3 |" in shown
    for mode, case in of_each_mode.items():
        assert f"| {mode} | {case.dtype} | 1 |" in shown
    for row in rows:
        row |= {"x_torch": 0.5} if "x_torch" in row else {}
    assert tables.slow_layers(rows).count("0.5 |") == 3
    assert tables.slow_layers([]) == "None."


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 6), (2, 4, 3, 5, 6)])
def test_every_drawn_kind_of_layer_is_right(shape: tuple[int, ...]):
    for dtype, order, mode in product(("float32", "float64", "float16"), ("planar", "channels_last"), layers.MODES[2:]):
        if order == "channels_last" and len(shape) < 4:
            continue
        for fusion in set(layers.FUSIONS) - {"bn+add+relu"}:
            case = Case(shape, dtype, order if len(shape) > 2 else "dense", fusion)
            assert not [
                r["absent"] for r in wall.measure(case, ("torch", "ours fused"), 0, "layers", mode) if "absent" in r
            ]


def test_depthwise_convolutions_are_measured_at_once_and_shown():
    small = depthwise.Layers((2, 32, 6, 6), 3, 1, "relu6", "MobileNetV2")
    rows = [row for before in (False, True) for row in depthwise.measure(small, "planar", before, 0.01)]
    assert {row["contestant"] for row in rows} == {"torch", "ours", "at once"}
    assert not any("absent" in row for row in rows)
    shown = tables.depthwise(rows)
    assert "| MobileNetV2 | (2, 32, 6, 6) | 3, 1 | planar | BN |" in shown
    for case, order, _ in depthwise.cases(True):
        net = depthwise.network(case, True)
        assert len(batchnorm.accelerate(net, torch.randn(case.shape)).report.convolved) == 1
        assert order in ("planar", "channels_last")


@pytest.mark.skipif(whole.torchvision() is None, reason=whole.NO_TORCHVISION)
def test_the_bound_of_a_whole_network_is_its_convolutions():
    """All of them, and neither normalization nor activations."""
    bound, network = (whole.Step("mobilenet_v2", name, (2, 3, 32, 32)) for name in (whole.WITHOUT, "torch"))
    kinds = [[type(module).__name__ for module in step.net.modules()] for step in (bound, network)]
    assert kinds[0].count("Conv2d") == kinds[1].count("Conv2d") > 50
    assert not any(kind.startswith(("BatchNorm", "ReLU")) for kind in kinds[0])
    bound.run()
    assert all(p.grad is not None for p in bound.net.parameters())
