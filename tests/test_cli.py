"""The command line as a user meets it: exit codes, one message on stderr, no traceback."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.lab.speed import Timing

ROOT = Path(__file__).parent.parent
SMALL = ["train", "--data", "digits", "--steps", "6", "--batch-size", "32", "--no-baseline"]


def words(text):
    """Help without its frames, colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[^\x00-\x7f]", "", text).split())


def test_help_teaches_without_loading_torch():
    code = (
        "import sys; from batchnorm.cli import main; code = main(['train', '--help']); "
        "sys.exit(code or ('torch' in sys.modules) * 3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stderr
    shown = words(done.stdout)
    for part in ("Examples", "figure1: 5000", "mnist5k", "default: 60", "--resume"):
        assert part in shown


COMMANDS = ["train", "summary", "diagnose", "calibrate", "fold", "convert", "adapt", "lab", "bench", "info"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    assert main([command, "--help"]) == 0
    assert "Usage: batchnorm " + command in words(capsys.readouterr().out)


def test_train_writes_a_run_and_prints_its_verdict(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "Report:" in shown.out
    assert "model.onnx:verified" in "".join(shown.out.split())  # lines break where the folder's name lets them
    assert "calibrating" in shown.err
    assert (tmp_path / "run" / "report.html").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["steps"], config["batch_size"], config["baseline"]) == (6, 32, False)


def test_every_option_reaches_the_run(tmp_path, monkeypatch):
    seen = []

    def stop(config, progress):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.training.train", stop, raising=False)
    given = {
        "network": "convnet",
        "data": "x.npy",
        "labels": "y.npy",
        "out": "here",
        "steps": 7,
        "batch_size": 8,
        "optimizer": "adam",
        "lr": 0.3,
        "baseline_lr": 0.4,
        "momentum": 0.5,
        "weight_decay": 0.6,
        "seed": 9,
        "threads": 2,
        "device": "meta",
        "placement": "after_activation",
        "method": "ioffe",
        "eval_every": 3,
        "task": "regression",
        "samples": "images",
        "statistics": "rank",
        "timeout": 60.0,
        "checkpoint_every": 5,
    }
    options = [str(w) for k, v in given.items() for w in ("--" + k.replace("_", "-"), v)]
    options += ["--set", "width=3", "--set", "kind=wide"]
    assert main(["train", *options, "--overwrite", "--baseline", "--fsdp"]) == 130
    arguments = {"width": 3, "kind": "wide"}
    assert vars(seen[0]) == {**given, "overwrite": True, "baseline": True, "fsdp": True, "arguments": arguments}


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A folder with the user's module and damaged files, which is the current one."""
    (tmp_path / "users.py").write_text(
        "from torch import nn\n"
        "def good(): return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(),\n"
        "                                 nn.Flatten(), nn.Linear(108, 10))\n"
        "def nothing(): return nn.Sequential(nn.Flatten(), nn.Softmax(1))\n"
        "def broken(): raise RuntimeError('no luck')\n"
    )
    y = np.arange(40) % 2
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.savez(tmp_path / "good.npz", x=x, y=y)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:300])
    np.savez(tmp_path / "nan.npz", x=x * np.nan, y=y)
    np.savez(tmp_path / "flat.npz", x=x[:, 0], y=y)
    np.savez(tmp_path / "objects.npz", x=np.array([{}] * 40, dtype=object), y=y)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(x))
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("users", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "cut.npz"], "cut.npz: the archive is damaged or cut short"),
        (["train", "--data", "nan.npz"], "nan.npz: 120 values of x are NaN"),
        (["train", "--data", "flat.npz"], "flat.npz: x has shape (40,)"),
        (["train", "--data", "objects.npz"], "objects.npz: array 'x' holds pickled objects"),
        (["train", "--data", "pickle.npy", "--labels", "good.npz"], "pickle.npy: it is a pickle"),
        (["train", "--data", "missing.npz"], "missing.npz: it cannot be read"),
        (["train", "--data", "good.npz"], "do not make one batch of 60"),
        (["train", "--network", "users:nowhere", "--data", "digits"], "nowhere does not exist"),
        (["train", "--network", "users:broken", "--data", "digits"], "RuntimeError: no luck"),
        (["train", "--network", "users:nothing", "--data", "digits"], "nothing to normalize"),
        (["train", "--network", "convnet", "--data", "good.npz", "--batch-size", "8"], "takes images"),
        ([*SMALL, "--out", "."], "it holds files and no run"),
        (["train", "--data", "missing.npz", "--out", "."], "it holds files and no run"),  # before the data are read
        (["train", "--data", "missing.npz", "--out", "file"], "it is a file"),
        (["train", "--data", "missing.npz", "--out", "file/run"], "/file is a file)"),
        ([*SMALL, "--out", "file/run"], "cannot be written"),
        ([*SMALL, "--lr", "nan"], "lr=nan"),
        (["train", "--resume", "nowhere"], "expected the folder of a run"),
        (["train", "--resume", "nowhere", "--lr", "1"], "--lr cannot be changed"),
        (["summary", "--network", "users:good", "--shape", "4;4"], "expected sizes like"),
        (
            [
                *("fold", "--network", "users:good", "--shape", "2,1,8,8"),
                *("--weights", "pickle.npy", "--out", "a.safetensors"),
            ],
            "weights pickle.npy: it is damaged, or holds more than tensors; pickled code is never run",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(users, capsys, arguments, message):
    before = sorted(path.name for path in users.rglob("*") if "__pycache__" not in str(path))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("batchnorm: error: ") == 1
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert before == sorted(path.name for path in users.rglob("*") if "__pycache__" not in str(path))


@pytest.mark.parametrize("arguments", [["train", "--steps", "many"], ["train", "--no-such"], ["frobnicate"]])
def test_wrong_usage_is_exit_code_2(capsys, arguments):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_divergence_is_exit_code_1_with_a_report(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path / "run"), "--lr", "1e38"]) == 1
    assert "diverged" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()


def test_ctrl_c_says_how_to_go_on_and_resume_does(tmp_path, monkeypatch):
    monkeypatch.setattr("batchnorm.training.procedure2.export_network", lambda *arguments: [])
    run = tmp_path / "run"
    command = [sys.executable, "-m", "batchnorm", "train"]
    options = ["--data", "digits", "--steps", "1000000", "--batch-size", "32", "--no-baseline"]
    process = subprocess.Popen(
        [*command, *options, "--eval-every", "1000", "--out", str(run)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (run / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # config.json is written just before the first step
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"batchnorm train --resume {run}" in " ".join(err.split())
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert main(["train", "--resume", str(run), "--steps", str(step + 2)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["curves"]["batch norm"]["steps"][-1] == step + 2


def test_summary_calibrate_and_fold_of_a_users_network(users, capsys):
    assert main(["summary", "--network", "users:good", "--shape", "2,1,8,8"]) == 0
    assert "BatchNorm2d" in capsys.readouterr().out
    options = ["--network", "users:good", "--data", "digits", "--out", "calibrated.safetensors"]
    assert main(["calibrate", *options]) == 0
    state = load_file(users / "calibrated.safetensors")
    assert state["1.running_mean"].abs().max() > 0
    options = ["--network", "users:good", "--weights", "calibrated.safetensors", "--shape", "2,1,8,8"]
    assert main(["fold", *options, "--out", "folded.safetensors"]) == 0
    assert "1 -> 0" in capsys.readouterr().out
    folded = load_file(users / "folded.safetensors")
    assert not any("running" in name for name in folded)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    net.load_state_dict({k: v for k, v in state.items() if k[0] in "01"})
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        ours = nn.functional.conv2d(x, folded["0.weight"], folded["0.bias"])
        torch.testing.assert_close(ours, net(x))


def test_diagnose_and_its_repair(users, capsys):
    common = ["--network", "users:good", "--data", "digits"]
    assert main(["diagnose", *common, "--html", "new/page.html"]) == 0
    out = capsys.readouterr().out
    assert "untrained: The running statistics of 1 of 1 layer are the initial" in out
    assert "Does evaluation follow training?" in (users / "new" / "page.html").read_text(encoding="utf-8")
    assert main(["calibrate", *common, "--out", "calibrated.safetensors"]) == 0
    capsys.readouterr()
    options = ["--weights", "calibrated.safetensors", "--batches", "5", "--in-order", "--json"]
    assert main(["diagnose", *common, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"] == 5
    assert found["layers"][0]["cause"] is None
    assert main(["diagnose", *common, "--batches", "0"]) == 2
    assert "expected 1 or more" in capsys.readouterr().err


def test_fold_writes_whole_networks(users, capsys):
    options = ["fold", "--network", "users:good", "--shape", "2,1,8,8", "--out"]
    torch.manual_seed(0)
    assert main([*options, "folded.pt2"]) == 0
    program = torch.export.load("folded.pt2")
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert program.module()(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    capsys.readouterr()
    for out, message in (("folded.txt", "expected a .safetensors"), ("no/folded.pt2", "cannot be written")):
        assert main([*options, out]) == 2
        assert message in capsys.readouterr().err


def test_info_tells_what_is_there(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_convert_and_the_forms_of_summary(users, capsys):
    common = ["--network", "users:good", "--shape", "2,1,8,8"]
    assert main(["summary", *common, "--html", "layers.html", "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["layers"][0]["type"] == "BatchNorm2d"
    assert "BatchNorm2d" in (users / "layers.html").read_text()
    assert main(["convert", *common, "--set", "nonfinite=skip", "--set", "eps=0.001", "--out", "c.safetensors"]) == 0
    assert "nonfinite='skip'" in capsys.readouterr().out
    assert "1.num_batches_skipped" in load_file(users / "c.safetensors")
    for options, message in ((["--set", "nonfinite"], "NAME=VALUE"), (["--set", "made_up=1"], "made_up")):
        assert main(["convert", *common, *options, "--out", "d.safetensors"]) == 2
        assert message in capsys.readouterr().err
    assert not (users / "d.safetensors").exists()


def test_archives_instead_of_networks(tmp_path, capsys):
    net, x = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval(), torch.randn(2, 1, 8, 8)
    path, out = str(tmp_path / "net.pt2"), str(tmp_path / "out.pt2")
    torch.export.save(torch.export.export(net, (x,)), path)
    assert main(["fold", path, "--out", out]) == 0
    assert "1 -> 0" in capsys.readouterr().out
    torch.testing.assert_close(torch.export.load(out).module()(x), net(x))
    assert main(["summary", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["type"] == "BatchNorm2d"
    assert main(["convert", path, "--out", out]) == 0
    torch.testing.assert_close(torch.export.load(out).module()(x), net(x))


def test_onnx_files(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    parts = [
        onnx.numpy_helper.from_array(np.full(3, v, np.float32), n) for n, v in zip("gbmv", (2, 1, 3, 4), strict=True)
    ]
    parts.append(onnx.numpy_helper.from_array(np.ones((3, 1, 1), np.float32), "w"))
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv"),
        onnx.helper.make_node("BatchNormalization", ["y", *"gbmv"], ["z"], "bn"),
    ]
    values = [onnx.helper.make_tensor_value_info(*v) for v in (("x", 1, ["n", 1, "t"]), ("z", 1, ["n", 3, "t"]))]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], parts)
    opset = [onnx.helper.make_opsetid("", 17)]
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    x = np.random.default_rng(0).normal(size=(3, 1, 5)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    assert main(["fold", str(path), "--out", str(out), "--inputs", str(tmp_path / "x.npz")]) == 0
    shown = capsys.readouterr().out
    assert "bn -> conv" in shown
    assert "example, float32" in shown
    sessions = [runtime.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in (path, out)]
    np.testing.assert_allclose(*(session.run(None, {"x": x})[0] for session in sessions), rtol=1e-5, atol=1e-5)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:-40])
    for arguments, message in (
        ([str(path), "--inputs", str(tmp_path / "cut.npz")], "cut.npz: the archive is damaged or cut short"),
        ([str(tmp_path / "cut.onnx")], "cannot be read as an ONNX model"),
        ([str(tmp_path / "gone.onnx")], "gone.onnx"),
        ([str(path), "--tolerance", "0"], "nothing was written"),
    ):
        assert main(["fold", *arguments, "--out", str(tmp_path / "no.onnx")]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.npz", "cut.onnx", "m.onnx", "out.onnx", "x.npz"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_its_extra(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "m.onnx").touch()
    assert main(["fold", str(tmp_path / "m.onnx"), "--out", str(tmp_path / "out.onnx")]) == 2
    assert f"{package} is not installed: pip install 'batchnorm[export]'" in capsys.readouterr().err


def test_files_and_networks_are_not_mixed(tmp_path, capsys):
    for arguments, message in (
        (["fold", "net.pt2", "--out", "x.onnx"], "--out of the same kind"),
        (["fold", "--out", "x.onnx"], "either a file"),
        (["fold", "net.txt", "--out", "x.txt"], "expected .onnx or .pt2"),
        (["fold", "net.pt2", "--network", "a:b", "--out", "x.pt2"], "either a file"),
        (["fold", "net.pt2", "--shape", "2,3", "--out", "x.pt2"], "go with --network"),
        (["fold", "net.pt2", "--inputs", "x.npz", "--out", "x.pt2"], "goes with an .onnx file"),
        (["summary", "--network", "a:b"], "needs --shape"),
        (["summary", "gone.onnx"], "gone.onnx cannot be read (No such file or directory)"),
        (["convert", "gone.pt2", "--out", "x.pt2"], "gone.pt2"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_bench_measures_and_checks(capsys, monkeypatch):
    assert main(["bench", "64,8", "4,3,5,5", "--seconds", "0.01", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["shape"], row["phase"]) for row in rows[2:4]] == [
        ([64, 8], "inference"),
        ([4, 3, 5, 5], "training step"),
    ]
    assert all(row["ratio"] > 0 and 0 < row["our_error"] <= 16 for row in rows)
    assert main(["bench", "64,8", "--seconds", "0.01", "--dtype", "bfloat16"]) == 0
    assert "training forward" in capsys.readouterr().out
    for arguments, message in (
        (["64"], "expected sizes like"),
        (["1,8"], "2 values a channel"),
        (["2,2,2,2,2,2"], "2 to 5 sizes"),
        (["4,4", "--dtype", "int8"], "dtype 'int8'"),
        (["4,4", "--device", "nowhere"], "device 'nowhere'"),
        (["4,4", "--threads", "0"], "--threads 0"),
        (["4,4", "--seconds", "0"], "more than 0"),
    ):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
    forward = bn.BatchNorm1d.forward
    monkeypatch.setattr(bn.BatchNorm1d, "forward", lambda self, x: forward(self, x) * 1.001)
    assert main(["bench", "64,8", "--seconds", "0.01"]) == 1
    assert "wrong" in capsys.readouterr().out


def test_ctrl_c_shows_what_was_measured(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        yield Timing((4, 4), "float32", "inference", 2.0, 1.0, 0.5, 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.lab.speed.compare", interrupted)
    assert main(["bench", "4,4"]) == 130
    assert "2.00" in capsys.readouterr().out


def test_adapt_moves_the_statistics_alone(users, capsys):
    x = np.random.default_rng(0).normal(5, 2, size=(20, 1, 8, 8)).astype(np.float32)
    np.save(users / "shifted.npy", x)
    np.savez(users / "shifted.npz", x=x, other=x)
    options = ["--network", "users:good", "--weights", "start.safetensors"]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    save_file(net.state_dict(), users / "start.safetensors")
    bn.adapt(net, torch.from_numpy(x), prior=4)
    for data in ("shifted.npy", "shifted.npz"):
        assert main(["adapt", *options, "--data", data, "--prior", "4", "--out", "a.safetensors"]) == 0
        adapted = load_file(users / "a.safetensors")
        for name, value in net.state_dict().items():
            torch.testing.assert_close(adapted[name], value)
    np.save(users / "bytes.npy", np.full((8, 8, 8), 255, np.uint8))
    assert main(["adapt", *options, "--data", "bytes.npy", "--prior", "0", "--out", "b.safetensors"]) == 0
    with torch.no_grad():
        mean = net[0](torch.ones(1, 1, 8, 8)).mean((0, 2, 3))
    torch.testing.assert_close(load_file(users / "b.safetensors")["1.running_mean"], mean)
    capsys.readouterr()
    np.savez(users / "empty.npz", y=x)
    for arguments, message in (
        (["--data", "empty.npz"], "no array 'x'"),
        (["--data", "cut.npz"], "damaged or cut short"),
        (["--data", "pickle.npy"], "it is a pickle"),
        (["--data", "shifted.npy", "--prior", "-1"], "prior=-1"),
        (["--data", "shifted.npy", "--method", "magic"], "magic"),
        (["--data", "shifted.npy", "--batch-size", "0"], "--batch-size 0"),
        (["--data", "shifted.npy", "--weights", "a.pt"], "a.pt"),
    ):
        assert main(["adapt", *options, "--out", "c.safetensors", *arguments]) == 2, message
        assert message in capsys.readouterr().err
    assert not (users / "c.safetensors").exists()
