"""Generated data, damaged files, links, pipes and pickles: a result, or one error that names the file; never more."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import contents
from safetensors.torch import save as to_safetensors

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.errors import BatchNormError, DataError
from batchnorm.progress import TrainingBar
from batchnorm.training import load_data, procedure2, train
from batchnorm.training.config import TrainConfig

TIMES = int(os.environ.get("HOSTILE_TIMES", "1"))  # 20: the ten thousand cases that are run by hand
quick = settings(max_examples=60 * TIMES, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = ["?", "u1", "i2", ">i4", "i8", "u8", "f2", ">f4", "f4", "f8", "c8", "U3", "S2", "M8[s]", "m8[s]", "f4,i2"]


@st.composite
def arrays(draw):
    """Samples and labels of any shape and dtype, which seldom go together."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n = draw(st.sampled_from([0, 1, 2, 5, 30, 31]))
    shape = (n, *draw(st.lists(st.sampled_from([0, 1, 3, 5, 8]), max_size=4)))
    x = (rng.normal(size=shape) * draw(st.sampled_from([0, 1, 1e3, 1e30, 1e300]))).astype("f8")
    with np.errstate(all="ignore"):
        dtype = draw(st.sampled_from(DTYPES))
        x = x.astype(dtype) if dtype in DTYPES[:-5] else np.zeros(shape, dtype)
    if x.dtype.kind == "f" and x.size and draw(st.booleans()):
        x.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0]))
    count = draw(st.sampled_from([n, n, n, n + 1]))
    labels = rng.integers(-2, draw(st.sampled_from([-1, 0, 2, 40])), size=count)
    with np.errstate(all="ignore"):
        y = labels.astype(draw(st.sampled_from(DTYPES[:-3])))
    return x, y if draw(st.booleans()) else y.reshape(-1, 1)


def data_or_error(name, **options):
    """A data set that is what a network takes, or an error of one line that names the file."""
    try:
        data = load_data(str(name), **options)
    except BatchNormError as refusal:
        text = str(refusal)
    else:
        text = ""
    if text:
        assert Path(name).name in text
        assert "\n" not in text
        return None
    assert len(data.x_train) == len(data.y_train) > 0
    assert len(data.x_test) == len(data.y_test) > 0
    assert torch.isfinite(data.x_train.double()).all()
    assert data.x_train.dtype == torch.float32
    if data.task == "classification":
        assert int(data.y_train.max()) < data.num_classes == len(data.classes)
        assert int(data.y_train.min()) == 0
    return data


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@settings(quick, max_examples=200 * TIMES)
@given(arrays())
def test_generated_arrays(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("a") / "file.npz"
    np.savez(path, x=found[0], y=found[1])
    data_or_error(path)


def plain_files():
    """A good file of each kind that data comes in, with how it is given."""
    x, y = np.random.default_rng(0).normal(size=(30, 4)).astype("f4"), np.arange(30) % 2
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, x)
    np.savez_compressed(npz, x=x, y=y)
    return {"file.npy": npy.getvalue(), "file.npz": npz.getvalue()}


FILES = plain_files()


@st.composite
def damaged(draw, whole):
    """The bytes of a file, cut, changed or followed by others."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.one_of(st.none(), st.integers(0, len(content))))
    return bytes(content[:cut]) + draw(st.sampled_from([b"", b"\0", b"PK\x03\x04"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
@quick
@given(st.data())
def test_damaged_data_files(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("d")
    (folder / name).write_bytes(data.draw(damaged(FILES[name])))
    np.save(folder / "y.npy", np.arange(30) % 2)
    data_or_error(folder / name, labels=str(folder / "y.npy") if name == "file.npy" else None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, without the exports that take seconds."""
    folder = tmp_path_factory.mktemp("run")
    x = np.random.default_rng(0).normal(size=(40, 3))
    np.savez(folder / "t.npz", x=x, y=np.arange(40) % 2)
    with pytest.MonkeyPatch.context() as patch:
        forms = procedure2.export_network.__globals__["_forms"]
        patch.setitem(procedure2.export_network.__globals__, "_forms", lambda *a: forms(*a)[:2])
        train(TrainConfig(data=str(folder / "t.npz"), steps=2, batch_size=8, baseline=False, out=str(folder / "run")))
    return folder / "run"


@pytest.mark.parametrize("name", ["config.json", "batchnorm.safetensors"])
@quick
@given(st.data())
def test_damaged_runs(run, tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("r")
    for path in run.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(data.draw(damaged((run / name).read_bytes())))
    try:
        found = bn.load_run(folder)
    except BatchNormError:
        return
    assert found.network(found.example).shape[0] == len(found.example)


@quick
@given(st.data())
def test_damaged_weights(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("w")
    state = {"0.weight": torch.ones(4, 3), "0.bias": torch.zeros(4)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    kind, whole = data.draw(st.sampled_from([("w.pt", buffer.getvalue()), ("w.safetensors", to_safetensors(state))]))
    (folder / kind).write_bytes(data.draw(damaged(whole)))
    net = torch.nn.Sequential(torch.nn.Linear(3, 4))
    from batchnorm.training.networks import load_weights

    text = kind
    try:
        load_weights(net, folder / kind)
    except DataError as refusal:
        text = str(refusal)
    assert kind in text


def one_line(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.count("batchnorm: error: ") == 1
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize("kind", ["dangling link", "looping link", "folder", "pipe", "device", "long name", "empty"])
@pytest.mark.parametrize("role", ["data", "labels", "weights", "run", "inputs"])
def test_what_is_no_file(users, capsys, kind, role):
    path = users / {"data": "odd.npy", "weights": "odd.safetensors", "inputs": "odd.npz"}.get(role, "odd.npy")
    if kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "looping link":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "long name":
        path = users / ("n" * 300 + path.suffix)
    else:
        path.touch()
    np.save("x.npy", np.zeros((9, 3)))
    (users / "m.onnx").touch()
    net = ["--network", "nets:net", "--shape", "2,1,8,8"]
    command = {
        "data": ["train", "--data", str(path), "--labels", "x.npy"],
        "labels": ["train", "--data", "x.npy", "--labels", str(path)],
        "weights": ["summary", *net, "--weights", str(path)],
        "run": ["summary", "--run", str(path)],
        "inputs": ["fold", "m.onnx", "--inputs", str(path), "--out", "o.onnx"],
    }[role]
    if role == "inputs":
        pytest.importorskip("onnx")
    if role == "weights" and kind in ("pipe", "device"):
        pytest.skip("read by safetensors")
    before = set(contents(users)) if kind not in ("pipe", "device") else None
    one_line(command, capsys)
    assert before is None or set(contents(users)) == before


class Marker:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import sys; sys.modules['unpickled'] = None",))


@pytest.mark.parametrize("where", ["data.npy", "data.npz", "labels", "weights.pt", "checkpoint"])
def test_no_pickle_is_executed(users, capsys, run, where):
    objects = np.array([Marker()] * 9, dtype=object)
    good = users / "good.npy"
    np.save(good, np.zeros((9, 3)))
    if where == "data.npz":
        np.savez("p.npz", x=objects, y=objects)
        arguments = ["train", "--data", "p.npz"]
    elif where == "weights.pt":
        (users / "w.pt").write_bytes(pickle.dumps({"a": Marker()}))
        arguments = ["summary", "--network", "nets:net", "--shape", "2,1,8,8", "--weights", "w.pt"]
    elif where == "checkpoint":
        (users / "r").mkdir()
        (users / "r" / "config.json").write_bytes((run / "config.json").read_bytes())
        with zipfile.ZipFile(users / "r" / "checkpoint.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"step": Marker()}))
            archive.writestr("archive/version", "3")
        arguments = ["train", "--resume", "r"]
    else:
        np.save("p.npy", objects, allow_pickle=True)
        names = ("p.npy", "good.npy") if where == "data.npy" else ("good.npy", "p.npy")
        arguments = ["train", "--data", names[0], "--labels", names[1]]
    one_line(arguments, capsys)
    assert "unpickled" not in sys.modules


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, which a run in the background of a shell has not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


STAGES = ["loading", "inserting", "training", "calibrating", "folding", "exporting", "timing", "writing"]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_every_stage(users, capsys, monkeypatch, stage):
    forms = procedure2.export_network.__globals__["_forms"]
    monkeypatch.setitem(procedure2.export_network.__globals__, "_forms", lambda *a: forms(*a)[:2])
    told = TrainingBar.stage

    def press(self, text):
        told(self, text)
        if text.startswith(stage):
            os.kill(os.getpid(), signal.SIGINT)

    command = ["train", "--network", "nets:plain", "--data", "digits", "--steps", "2", "--batch-size", "32"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingBar, "stage", press)
        assert main([*command, "--out", "run"]) == 130
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    left = contents(users / "run") if (users / "run").exists() else {}
    assert not [name for name in left if Path(name).name.startswith(".")]
    if stage in ("loading", "inserting"):
        assert not left
        return
    assert json.loads(left["config.json"])["config"]["steps"] == 2
    if stage not in ("training", "writing"):
        assert "batchnorm train --resume run" in " ".join(shown.split())
    assert main(["train", "--resume", "run"]) == 0
    assert (users / "run" / "report.html").exists()
