"""A full disk, or a file size limit: one line, code 2, nothing half left behind, and what was kept goes on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from machines import MODULE, contents, file_size_limit
from safetensors.torch import save_file

from batchnorm.cli import main
from batchnorm.errors import InputError, WriteError
from batchnorm.training.procedure2 import export_network
from batchnorm.writing import in_bytes, write_bytes, writing

TRAIN = ["train", "--network", "nets:plain", "--data", "digits", "--steps", "4", "--batch-size", "32"]
NET = ["--network", "nets:net"]


def refused(arguments, capsys):
    """The one line that a command ends with that cannot write."""
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("batchnorm: ")]
    assert line.startswith("batchnorm: error: ")
    return line


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 100_000])
def test_a_stream_is_whole_or_not_there(tmp_path, size):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with file_size_limit(size), pytest.raises(WriteError, match=r"file size limit \(ulimit -f\) it needs 100\.0 kB"):
        write_bytes(path, bytes(100_001))
    assert contents(tmp_path) == {"file.bin": b"old"}
    with file_size_limit(size):
        write_bytes(path, bytes(size))
    assert path.read_bytes() == bytes(size)


def test_writers_in_c_do_not_end_the_process(tmp_path):
    """torch's own writer aborts in its destructor where a stream raises."""
    program = torch.export.export(torch.nn.Linear(30, 30), (torch.zeros(2, 30),))
    for save in (lambda f: torch.save({"a": torch.zeros(1000)}, f), lambda f: torch.export.save(program, f)):
        with file_size_limit(100), pytest.raises(WriteError, match="file size limit"), writing(tmp_path / "x.pt2") as f:
            save(f)
    assert not contents(tmp_path)


def test_other_errors_pass_and_leave_nothing(tmp_path):
    def half(stream):
        stream.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), writing(tmp_path / "x") as stream:
        half(stream)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (3_210_000, "3.2 MB"), (5e15, "5000.0 TB")]
)
def test_sizes_in_words(size, text):
    assert in_bytes(size) == text


def commands(folder):
    """Every command that writes one file, and that file."""
    weights = ["--weights", str(folder / "w.safetensors")]
    shape, data = ["--shape", "2,1,8,8"], ["--data", "digits"]
    net = bn_net()
    save_file(net.state_dict(), folder / "w.safetensors")
    program = torch.export.export(net.eval(), (torch.zeros(2, 1, 8, 8),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    (folder / "net.pt2").write_bytes(buffer.getvalue())
    return {
        "summary": ["summary", *NET, *shape, "--html"],
        "diagnose": ["diagnose", *NET, *data, "--batches", "2", "--html"],
        "calibrate": ["calibrate", *NET, *data, *weights, "--out"],
        "adapt": ["adapt", *NET, *data, *weights, "--out"],
        "fold": ["fold", *NET, *shape, *weights, "--out"],
        "fold an archive": ["fold", str(folder / "net.pt2"), "--out"],
        "convert an archive": ["convert", str(folder / "net.pt2"), "--out"],
        "convert": ["convert", *NET, *shape, "--out"],
        "convert --from": ["convert", "--from", str(folder / "w.safetensors"), *NET, "--to"],
        "convert --from, to others": ["convert", "--from", str(folder / "w.safetensors"), *NET, "--to"],
    }


def bn_net():
    import nets

    return nets.net()


WRITING = ["summary", "diagnose", "calibrate", "adapt", "fold", "fold an archive", "convert an archive", "convert"]
WRITING += ["convert --from", "convert --from, to others"]
SUFFIX = {"summary": ".html", "diagnose": ".html", "convert --from, to others": ".weights.h5"}


@pytest.mark.parametrize("name", WRITING)
def test_every_command_that_writes_a_file(users, capsys, name):
    command = commands(users)[name]
    suffix = SUFFIX.get(name, ".pt2" if "archive" in name else ".safetensors")
    (users / f"out{suffix}").write_bytes(b"of before")
    before = contents(users)
    with file_size_limit(200):
        line = refused([*command, f"out{suffix}"], capsys)
    assert f"out{suffix}: it cannot be written (file size limit" in line
    assert "it needs" in line
    assert contents(users) == before
    assert main([*command, f"out{suffix}"]) == 0


def test_fold_of_an_onnx_file(users, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    parts = [onnx.numpy_helper.from_array(np.ones(64, np.float32), name) for name in "gbmv"]
    parts.append(onnx.numpy_helper.from_array(np.ones((64, 1, 1), np.float32), "w"))
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv"),
        onnx.helper.make_node("BatchNormalization", ["y", *"gbmv"], ["z"], "bn"),
    ]
    values = [onnx.helper.make_tensor_value_info(*v) for v in (("x", 1, ["n", 1, 4]), ("z", 1, ["n", 64, 4]))]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], parts)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), "net.onnx")
    before = contents(users)
    with file_size_limit(200):
        assert "file size limit" in refused(["fold", "net.onnx", "--out", "out.onnx"], capsys)
    assert contents(users) == before


def test_lab_keeps_the_finished_seeds_only(users, capsys):
    options = ["--quick", "--seeds", "1", "--workers", "1", "--out", "lab", "--set", "steps=2"]
    with file_size_limit(50):
        assert "file size limit" in refused(["lab", "figure1", *options], capsys)
    assert not [name for name in contents(users) if name.startswith("lab")]


LESSON = ["--network", "nets:net", "--data", "digits", "--set", "steps=2", "--out", "new/pages"]


@pytest.mark.parametrize("name", ["explain", "play"])
def test_pages_of_the_lab_leave_nothing(users, capsys, name):
    with file_size_limit(200):
        line = refused(["lab", name, *LESSON], capsys)
    assert f"new/pages/{name}.html: it cannot be written (file size limit" in line
    assert not (users / "new").exists()
    assert main(["lab", name, *LESSON]) == 0


@pytest.fixture(scope="module")
def few_forms():
    """Exports without the forms that take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        forms = export_network.__globals__["_forms"]
        patch.setitem(export_network.__globals__, "_forms", lambda *a: forms(*a)[:3])
        yield


@pytest.fixture(scope="module")
def sizes(few_forms, tmp_path_factory):
    """The sizes of the files of a finished run."""
    folder = tmp_path_factory.mktemp("sizes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        (folder / "nets.py").write_text(MODULE)
        assert main([*TRAIN, "--out", str(folder / "run")]) == 0
        sys.modules.pop("nets", None)
    return {name: len(content) for name, content in contents(folder / "run").items()}


@pytest.mark.parametrize("stopped_at", ["config.json", "checkpoint.pt", "model.pt2", "report.html"])
def test_train_says_what_is_kept_and_goes_on(users, capsys, sizes, stopped_at):
    limit = sizes[stopped_at] * 95 // 100  # the numbers in a report, and so its size, are of their run
    with file_size_limit(limit):
        line = refused([*TRAIN, "--out", "run"], capsys)
    written = contents(users / "run") if (users / "run").exists() else {}
    assert all(len(content) <= limit for content in written.values())
    assert not [name for name in written if name.startswith(".")]
    if stopped_at == "config.json":
        assert not written
        return
    assert "Make room, then go on with: batchnorm train --resume run" in line
    assert ("checkpoint.pt is kept" in line) == ("checkpoint.pt" in written) == (stopped_at != "checkpoint.pt")
    assert main(["train", "--resume", "run"]) == 0
    assert contents(users / "run").keys() == sizes.keys()
    assert json.loads((users / "run" / "metrics.json").read_text())["curves"]["batch norm"]["steps"][-1] == 4


def test_a_full_disk(users, capsys, small_disk):
    run = small_disk / "run"
    (small_disk / "filling").write_bytes(bytes(40_000))
    line = refused([*TRAIN, "--out", str(run)], capsys)
    assert "No space left on device; it needs" in line
    assert "are free there" in line
    assert not list(small_disk.rglob(".*"))
    (small_disk / "filling").unlink()
    assert main(["calibrate", *NET, "--data", "digits", "--out", str(small_disk / "w.safetensors")]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_printed(users):
    command = [sys.executable, "-m", "batchnorm", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("batchnorm: error: ")
    assert "Traceback" not in done.stderr


def test_errors_can_be_caught_as_the_errors_of_before(tmp_path):
    for kind in (InputError, OSError, ValueError):
        with file_size_limit(10), pytest.raises(kind):
            write_bytes(tmp_path / "x", bytes(100))
