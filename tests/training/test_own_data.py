"""Data and networks as people have them: labels of any kind, regression, sequences, large means, own layers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.errors import DataError, InputError, SurgeryError
from batchnorm.lab.of_runs import explain_run
from batchnorm.report.verdict import verdict
from batchnorm.training import TrainConfig, load_data, make_data, procedure2, train
from batchnorm.training.datasets import load_samples
from batchnorm.training.loop import batch_indices
from batchnorm.training.objectives import Regression
from batchnorm.training.sources import pair
from batchnorm.training.targets import classes_of

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4))
CLASSES = np.arange(120) % 3

MODULE = """
import torch
from torch import nn
def first(num_features, num_classes):
    return nn.Sequential(nn.BatchNorm1d(num_features), nn.Linear(num_features, num_classes))
def hidden(num_features, num_outputs, width=8, slope=0.0):
    return nn.Sequential(nn.Linear(num_features, width), nn.LeakyReLU(slope), nn.Linear(width, num_outputs))
class Recurrent(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.lstm, self.norm = nn.LSTM(features, 8, batch_first=True), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, classes)
    def forward(self, x): return self.out(self.norm(self.lstm(x)[0][:, -1]))
def recurrent(input_shape, num_classes): return Recurrent(input_shape[-1], num_classes)
def softmax(num_features, num_classes):
    return nn.Sequential(nn.Linear(num_features, 8), nn.ReLU(), nn.Linear(8, num_classes), nn.Softmax(1))
def sigmoid(num_features, num_classes):
    return nn.Sequential(nn.Linear(num_features, 8), nn.ReLU(), nn.Linear(8, num_classes), nn.Sigmoid())
class Memory(nn.GRU): pass
class OnlyRecurrent(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.gru, self.out = Memory(features, 8, batch_first=True), nn.Linear(8, classes)
    def forward(self, x): return self.out(self.gru(x)[0][:, -1])
def only_recurrent(input_shape, num_classes): return OnlyRecurrent(input_shape[-1], num_classes)
made = nn.Linear(3, 2)
def images(in_channels, num_classes):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
def tokens(num_classes): return nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(24, 6), nn.ReLU(),
                                              nn.Linear(6, num_classes))
def load_tokens():
    y = torch.arange(60) % 2
    return torch.stack([y * 20 + k for k in range(3)], 1), y
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of networks."""
    name = "people"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    yield tmp_path
    __import__("sys").modules.pop(name, None)


@pytest.fixture
def no_exports(monkeypatch):
    """But for the weights, the exporters take seconds."""
    forms = procedure2.export_network.__globals__["_forms"]
    monkeypatch.setitem(procedure2.export_network.__globals__, "_forms", lambda *a: forms(*a)[:2])


def saved(**arrays):
    np.savez("data.npz", **arrays)
    return "data.npz"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (CLASSES * 10 - 5, ("-5", "5", "15")),
        (np.array(["dog", "cat", "émeu"])[CLASSES], ("cat", "dog", "émeu")),
        (np.array([b"b", b"a", b"c"])[CLASSES], ("a", "b", "c")),
        (CLASSES == 1, ("False", "True")),
        (CLASSES.astype(np.uint64) + 2**63, tuple(str(2**63 + k) for k in range(3))),
        (CLASSES[:, None] + 1, ("1", "2", "3")),
    ],
)
def test_labels_become_class_numbers_in_their_order(folder, labels, names):
    data = load_data(saved(x=X, y=labels))
    assert (data.task, data.num_classes, data.classes) == ("classification", len(names), names)
    if names != ("False", "True"):
        assert any(note.startswith(f"Labels became class numbers: {names[0]} is 0") for note in data.notes)
    rows = {tuple(row): label for row, label in zip(X.astype(np.float32).tolist(), np.ravel(labels), strict=True)}
    for row, number in zip(data.x_test.tolist(), data.y_test.tolist(), strict=True):
        label = rows[tuple(row)]
        assert data.classes[number] == (label.decode() if isinstance(label, bytes) else str(label))


@pytest.mark.parametrize("dtype", [float, np.float32, int, bool])
def test_rows_with_a_single_1_are_named(folder, dtype):
    rows = np.eye(3)[CLASSES].astype(dtype)
    name = saved(x=X, y=rows)
    if np.dtype(dtype).kind == "f":
        assert any("if these are classes, give their numbers, as y.argmax(1)" in n for n in load_data(name).notes)
        return
    with pytest.raises(DataError, match=r"y has shape \(120, 3\).* a single 1 among zeros"):
        load_data(name)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(120, 4, device="meta"), "on the device 'meta', which has no values"),
        (torch.nested.nested_tensor([torch.zeros(3)] * 120, layout=torch.jagged), "is a nested tensor"),
        (None, "x is NoneType; expected an array"),
        ({"a": X}, r"x is a mapping with \['a'\]; expected an array"),
    ],
)
def test_what_is_no_array_is_named(x, message):
    with pytest.raises(DataError, match=message):
        make_data((x, CLASSES))


def test_items_that_are_no_pair_are_named():
    for item, message in (({"pixels": 1, "labels": 2}, "a dict with 'pixels', 'labels'"), ((1, 2, 3), "a tuple of 3")):
        with pytest.raises(DataError, match=f"gives {message}, expected"):
            pair(item, "mine")


ROWS = X[:30].astype(np.float32)
ANIMALS = ["ox", "cat", "elephant"]


class ByNumber:
    """Of no class of torch's, with texts of several lengths; as Hugging Face's data sets are."""

    def __len__(self):
        return 30

    def __getitem__(self, k):
        if not 0 <= k < 30:
            raise IndexError(k)
        return {"x": ROWS[k].tolist(), "y": ANIMALS[k % 3]}


class OneByOne(IterableDataset):
    def __iter__(self):
        return (ByNumber()[k] for k in range(30))


def in_batches():
    return ((ROWS[k : k + 10], [ANIMALS[row % 3] for row in range(k, k + 10)]) for k in (0, 10, 20))


@pytest.mark.parametrize(
    "stream",
    [
        ByNumber,
        OneByOne,
        lambda: (ByNumber()[k] for k in range(30)),
        in_batches,
        lambda: DataLoader(OneByOne(), batch_size=None),
        lambda: DataLoader(TensorDataset(torch.from_numpy(ROWS), torch.arange(30) % 3), batch_size=7),
    ],
)
def test_streams_of_samples_and_of_batches(stream):
    found, expected = make_data(stream()), make_data((ROWS, np.array([ANIMALS[k % 3] for k in range(30)])))
    order = list(found.classes) if "ox" in found.classes else ["cat", "elephant", "ox"]
    assert order == list(expected.classes)
    assert len(found.x_train) == len(expected.x_train) == 24
    rows = {tuple(row): ANIMALS[k % 3] for k, row in enumerate(ROWS.tolist())}
    names = found.classes if "ox" in found.classes else ANIMALS
    for x, y in zip(
        torch.cat([found.x_train[:], found.x_test[:]]), torch.cat([found.y_train, found.y_test]), strict=True
    ):
        assert rows[tuple(x.tolist())] == names[y]


def test_batches_that_may_be_samples_are_asked_about():
    batches = ((ROWS[k : k + 10], X[k : k + 10, 0]) for k in (0, 10, 20))
    with pytest.raises(DataError, match="may be samples or batches"):
        make_data(batches)


class Growing(ByNumber):
    def __getitem__(self, k):
        return np.full(3, 0.5 if k else 1, float if k else int), k % 2


def test_values_that_the_first_dtype_does_not_hold_are_refused():
    with pytest.raises(DataError, match="sample 1 has dtype float64, sample 0 int64"):
        make_data(Growing())
    with pytest.raises(DataError, match="dtype float64 follows int64"):
        make_data(Growing()[k] for k in range(30))
    with pytest.raises(DataError, match="dtype int64 follows int8"):
        make_data((np.full(3, 300 * k, np.int64 if k else np.int8), k % 2) for k in range(30))


@pytest.mark.parametrize(
    "source",
    [
        "DataLoader(TensorDataset(torch.zeros(9, 3)), batch_size=4)",
        "TensorDataset(torch.zeros(9, 3))",
        "(torch.zeros(3) for _ in range(9))",
        "iter([torch.zeros(4, 3), torch.zeros(5, 3)])",
        "torch.zeros(9, 3)",
    ],
)
def test_samples_without_labels_may_be_streams(folder, monkeypatch, source):
    if source.startswith("iter"):
        source = f"DataLoader({source[5:-1]}, batch_size=None)"
    monkeypatch.setattr("people.make", lambda: eval(source, globals()), raising=False)
    assert load_samples("people:make").shape == (9, 3)


def test_images_whose_channels_may_come_last_are_named(folder):
    data = load_data(saved(x=RNG.random((120, 8, 8, 2)), y=CLASSES))
    assert data.input_shape == (8, 8, 2)
    assert any("They are 8 channels of 8 x 2; if the channels come last" in note for note in data.notes)


def test_class_numbers_from_0_stay_as_they_are(folder):
    data = load_data(saved(x=X, y=CLASSES))
    assert data.classes == ("0", "1", "2")
    assert not any("Labels" in note for note in data.notes)


def test_floats_are_a_regression_unless_classes_are_asked_for(folder):
    data = load_data(saved(x=X, y=CLASSES.astype(float)))
    assert (data.task, data.num_classes, data.y_train.shape) == ("regression", 1, (96, 1))
    assert any("--task classification takes them for classes" in note for note in data.notes)
    assert load_data("data.npz", task="classification").classes == ("0.0", "1.0", "2.0")
    two = load_data(saved(x=X, y=X[:, :2]))
    assert (two.num_classes, two.y_test.shape) == (2, (24, 2))
    assert load_data(saved(x=X, y=CLASSES), task="regression").y_train.dtype == torch.float32
    with pytest.raises(DataError, match="a regression needs numbers"):
        load_data(saved(x=X, y=np.array(["a", "b", "c"])[CLASSES]), task="regression")


def test_the_lab_takes_the_loss_of_a_regression(folder, no_exports):
    """The gradients that it walks through are those of the run's own loss."""
    y = X @ np.array([1.0, -2.0, 0.5, 0.0]) + 100
    train(TrainConfig(network="people:hidden", data=saved(x=X, y=y), steps=3, batch_size=24, out="run"))
    found, source = explain_run("run", channel=2)
    assert "batch of 24" in source
    held = bn.load_run("run")
    data = held.load_data()
    at = batch_indices(len(data.x_train), 24, held.config.seed, 3)
    Regression.of(data).loss(held.network.train()(data.x_train[at]), data.y_train[at]).backward()
    norm = held.network.get_submodule(found.layer)
    assert found.sum_dy == pytest.approx(float(norm.bias.grad[2]), rel=1e-4, abs=1e-7)
    assert found.sum_dy_xhat == pytest.approx(float(norm.weight.grad[2]), rel=1e-4, abs=1e-7)


def table_with(**columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"a": X[:, 0], "b": np.arange(120), **columns})
    parquet.write_table(table, "t.parquet", row_group_size=50)
    return "t.parquet"


def test_labels_of_a_table_are_what_its_types_say(folder):
    pa = pytest.importorskip("pyarrow")
    texts = pa.array(["dog", "cat", "émeu"] * 40)
    for labels in (texts, texts.dictionary_encode(), texts.cast(pa.large_string()), texts.cast(pa.binary())):
        data = load_data(table_with(y=labels))
        assert (data.classes, data.input_shape) == (("cat", "dog", "émeu"), (2,))
    assert load_data(table_with(y=pa.array([None, True, False] * 40).fill_null(True))).classes == ("False", "True")
    prices = pa.array([Decimal("1.5"), Decimal("2.25")] * 60)
    pairs = pa.FixedSizeListArray.from_arrays(np.arange(240.0), 2)
    for targets, outputs in ((prices, 1), (pairs, 2)):
        data = load_data(table_with(y=targets))
        assert (data.task, data.num_classes) == ("regression", outputs)
    for labels, message in (
        (pa.array(["dog", None] * 60), "column 'y' has [0-9]+ missing values"),
        (pa.array([{"a": 1}] * 120), "column 'y' holds struct<a: int64>; expected numbers or texts"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(table_with(y=labels))


def test_features_of_a_table(folder):
    pa = pytest.importorskip("pyarrow")
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(RNG.normal(size=(120, 3, 5, 5)))
    vectors = pa.FixedSizeListArray.from_arrays(RNG.normal(size=480), 4)
    assert load_data(table_with(v=vectors, y=CLASSES)).input_shape == (6,)
    for column, message in (
        (images, r"column 'v' holds arrays of shape \(3, 5, 5\), and there are other columns"),
        (pa.array([[1.0] * (1 + k % 2) for k in range(120)]), "column 'v' holds lists of 1 to 2 values"),
        (pa.array(["a"] * 120), "column 'v' holds string; expected numbers"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(table_with(v=column, y=CLASSES))
    with pa.ipc.new_stream("t.arrows", (table := pa.table({"x": images, "y": CLASSES})).schema) as writer:
        writer.write_table(table)
    assert load_data("t.arrows").input_shape == (3, 5, 5)


def test_the_objective_of_a_regression_is_r2_in_float64(folder):
    data = load_data(saved(x=X, y=np.stack([X[:, 0] * 1e3 + 5e4, X[:, 1]], 1)))
    objective = Regression.of(data)
    said = data.y_test + torch.randn(data.y_test.shape) * torch.tensor([100.0, 0.1])
    loss, score = objective.judge(
        objective.tally(said[:10], data.y_test[:10]) + objective.tally(said[10:], data.y_test[10:]), 24
    )
    y, p = data.y_test.double().numpy(), said.double().numpy()
    assert score == pytest.approx((1 - ((y - p) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)).mean(), rel=1e-12)
    assert loss == pytest.approx((((y - p) / data.y_train.double().numpy().std(0)) ** 2).mean(), rel=1e-12)
    assert float(objective.loss(said, data.y_test)) == pytest.approx(loss, rel=1e-5)


def test_a_regression_is_trained_in_the_units_of_its_targets(folder, no_exports):
    y = X[:, 0] * 1000 + 5e4
    config = TrainConfig(
        network="people:hidden", data=saved(x=X, y=y), steps=80, batch_size=24, baseline=True, out="run"
    )
    found = train(dataclasses.replace(config, arguments={"width": 16}, eval_every=40))
    assert found.curves["batch norm"].test_r2[-1] > 0.7
    assert found.curves["batch norm"].test_accuracy == []
    assert [insertion.num_features for insertion in found.insertions] == [16]
    targets, said = found.predictions[:, 0, 0], found.predictions[:, 1, 0]
    assert 4e4 < float(targets.mean()) < 6e4
    assert float((said - targets).abs().mean()) < 600
    texts = [finding.text for finding in verdict(found)]
    assert any("test R²" in text for text in texts)
    run = bn.load_run("run")
    raw = np.asarray(X[:5])
    with torch.no_grad():
        torch.testing.assert_close(run.network(run.prepare(raw)), found.network(run.prepare(raw)))
    from batchnorm.report import write_report

    page = write_report(found, "run").read_text(encoding="utf-8")
    assert "What the finished network says" in page
    assert "Class by class" not in page


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_columns_of_a_large_mean_are_shifted_before_they_become_float32(folder, dtype):
    """Seconds since 1970, a day apart at most, beside plain columns, which stay as they were, bit for bit."""
    times = np.round(1.7e9 + RNG.uniform(0, 60, size=120))
    x = np.column_stack([np.round(X[:, 0] * 100), times, np.full(120, 3e9)]).astype(dtype)
    data = load_data(saved(x=x, y=CLASSES))
    assert data.preparation.shift[0] == data.preparation.shift[2] == 0
    assert any("Features are shifted in float64" in note and " 1 by 17000000" in note for note in data.notes)
    assert torch.equal(data.x_train[:, 0].double(), data.x_train[:, 0].double().round())
    shifted = torch.cat([data.x_train, data.x_test])[:, 1].double().numpy() + data.preparation.shift[1]
    assert sorted(shifted.tolist()) == sorted(times.tolist())  # every second is kept
    plain = load_data(saved(x=x[:, [0, 2]], y=CLASSES))
    assert plain.preparation.shift == ()


@pytest.mark.parametrize(
    ("shape", "dtype", "asked", "input_shape", "text"),
    [
        ((60, 12, 3), np.float32, None, (12, 3), "Samples are sequences"),
        ((60, 12, 12), np.float32, None, (1, 12, 12), "Images"),
        ((60, 12, 12), np.float32, "sequences", (12, 12), "Samples are sequences"),
        ((60, 12, 3), np.float32, "images", (1, 12, 3), "Images"),
        ((60, 12, 5), np.uint8, None, (1, 12, 5), "Images are divided by 255"),
        ((60, 9, 8, 3), np.float32, None, (3, 9, 8), "(N, H, W, C) became (N, C, H, W)"),
        ((60, 9, 8, 3), np.uint8, None, (3, 9, 8), "(N, H, W, C) became (N, C, H, W)"),
        ((60, 3, 9, 8), np.float32, None, (3, 9, 8), "Images"),
    ],
)
def test_what_samples_are(folder, shape, dtype, asked, input_shape, text):
    x = (RNG.uniform(0, 30, size=shape)).astype(dtype)
    data = load_data(saved(x=x, y=np.arange(60) % 2), samples=asked)
    assert data.input_shape == input_shape
    assert any(text in note for note in data.notes)
    if "sequences" in text:
        assert sorted(data.x_train.flatten().tolist() + data.x_test.flatten().tolist()) == sorted(x.ravel().tolist())
    if "became" in text:
        whole = torch.cat([data.x_train, data.x_test]) * data.preparation.scale
        torch.testing.assert_close(whole.mean((2, 3)).sum(0), torch.from_numpy(x).float().mean((1, 2)).sum(0))


def test_samples_that_are_not_what_was_asked_for(folder):
    with pytest.raises(DataError, match="are no images"):
        load_data(saved(x=X, y=CLASSES), samples="images")


def built(**options):
    return procedure2._Run.build(TrainConfig(batch_size=20, **options).resolve(), None)


def test_a_network_that_normalizes_its_input_first(folder, no_exports):
    found = train(TrainConfig(network="people:first", data=saved(x=X, y=CLASSES), steps=3, batch_size=20, out="run"))
    assert found.insertions == []
    assert [item.layer for item in found.certificate.folded] == ["network.0"]
    assert found.ok


def test_a_network_that_normalizes_behind_its_own_recurrent_layer(folder, no_exports):
    data = saved(x=RNG.normal(size=(60, 12, 3)).astype(np.float32), y=np.arange(60) % 2)
    found = train(TrainConfig(network="people:recurrent", data=data, steps=3, batch_size=20, out="run"))
    assert found.ok
    assert [item.layer for item in found.certificate.folded] == ["norm"]
    assert any("bn.LSTM(..., batch_norm='sequence')" in text for text in found.warnings)


def test_a_recurrent_network_with_nothing_else_to_normalize_is_told_what_there_is(folder):
    data = saved(x=RNG.normal(size=(60, 12, 3)).astype(np.float32), y=np.arange(60) % 2)
    with pytest.raises(SurgeryError, match=r"The recurrent layer gru has .*: bn\.GRU\(\.\.\., batch_norm='sequence'\)"):
        built(network="people:only_recurrent", data=data)


def test_a_network_in_place_of_its_factory_is_named(folder):
    with pytest.raises(InputError, match="network people:made: got a Linear, expected a factory"):
        built(network="people:made", data=saved(x=X, y=CLASSES))


@pytest.mark.parametrize(
    ("name", "labels", "remedy"),
    [("t.csv", "label", "to_parquet"), ("t.pt", None, "numpy.savez"), ("t.h5", None, "loader"), ("t.txt", "y", "")],
)
def test_files_of_other_kinds_are_named_with_the_way_to_one_of_ours(name, labels, remedy):
    with pytest.raises(DataError, match=rf"data '{name}': unknown, expected .*\.parquet.*{remedy}"):
        load_data(name, labels=labels)


def test_folders_and_addresses_are_named_as_what_they_are(folder):
    (folder / "images").mkdir()
    with pytest.raises(DataError, match=r"data 'images': unknown, .*It is a folder: a loader may return a data set"):
        load_data("images")
    with pytest.raises(DataError, match=r"data 'https://host/x\.npz': an address; nothing is downloaded"):
        load_data("https://host/x.npz")


@pytest.mark.parametrize(
    ("y", "told"),
    [
        (np.eye(2)[CLASSES % 2], "classes need one label for each sample. Each of its rows has a single 1"),
        (np.stack([X[:, 0], X[:, 1]], 1), "classes need one label .* Rows of numbers are the targets of a regression"),
        (X[:, 0].astype(float), f"{len(X)} different labels in {len(X)} samples; .*targets of a regression"),
    ],
)
def test_what_cannot_be_classes_is_refused_before_it_is_split(folder, y, told):
    with pytest.raises(DataError, match=told):
        load_data(saved(x=X, y=y), task="classification")


def test_outputs_of_a_sigmoid_under_cross_entropy_are_named(folder):
    warnings = built(network="people:sigmoid", data=saved(x=X, y=CLASSES)).warnings
    assert any("as after a sigmoid" in text for text in warnings)


def test_a_softmax_under_cross_entropy_and_imbalance_are_named(folder):
    y = (np.arange(120) % 12 == 0).astype(int)
    assert any("ends in a softmax" in text for text in built(network="people:softmax", data=saved(x=X, y=y)).warnings)
    warnings = built(network="people:hidden", data="data.npz").warnings
    assert not any("softmax" in text for text in warnings)
    assert any("91.7 % of the test samples are of class 0" in text for text in warnings)
    few = np.concatenate([np.zeros(100, int), np.ones(16, int), np.full(4, 7)])
    assert any("1 of 3 classes have one test sample or none: 7." in t for t in built(data=saved(x=X, y=few)).warnings)


def test_accuracy_is_told_by_class(folder, no_exports):
    y = np.where(X[:, 0] > 1.0, "rare", "usual")
    found = train(TrainConfig(network="people:hidden", data=saved(x=X, y=y), steps=30, batch_size=20, out="run"))
    data = load_data("data.npz")
    said = found.network(data.x_test).argmax(1)
    for number, one in enumerate(found.classes):
        of_class = data.y_test == number
        assert (one.label, one.test_samples) == (data.classes[number], int(of_class.sum()))
        assert one.accuracy == pytest.approx(float((said[of_class] == number).float().mean()))
    assert found.base_rate == max(one.test_samples for one in found.classes) / len(data.y_test)
    assert json.loads((found.folder / "metrics.json").read_text())["classes"][0]["label"] == "rare"


def test_token_numbers_are_trained_and_read_again(folder, no_exports):
    found = train(TrainConfig(network="people:tokens", data="people:load_tokens", steps=3, batch_size=20, out="run"))
    assert found.ok
    run = bn.load_run("run")
    assert run.example.dtype == torch.int64
    with torch.no_grad():
        assert torch.equal(run.network(run.example), found.network(run.example))


def test_a_large_test_part_is_not_measured_at_each_step(folder):
    data = saved(x=np.tile(X, (50, 1)), y=np.tile(CLASSES, 50))
    assert built(network="people:hidden", data=data, steps=100).config.eval_every == 20
    assert built(network="people:hidden", data=data, steps=100, eval_every=1).config.eval_every == 1


def test_every_command_takes_a_run(folder, no_exports, capsys):
    y = np.array(["a", "b", "c"])[CLASSES]
    found = train(TrainConfig(network="people:hidden", data=saved(x=X, y=y), steps=3, batch_size=20, out="run"))
    np.save("new.npy", X + 1)
    run = ["--run", "run"]
    commands = [
        ["summary", *run],
        ["diagnose", *run, "--batches", "2", "--batch-size", "20"],
        ["calibrate", *run, "--out", "c.safetensors"],
        ["adapt", *run, "--data", "new.npy", "--out", "a.safetensors"],
        ["fold", *run, "--out", "f.safetensors"],
        ["convert", *run, "--set", "eps=0.001", "--out", "v.safetensors"],
        ["convert", *run, "--from", "c.safetensors", "--to", "again.safetensors"],
        ["bench", *run, "--seconds", "0.001"],
        ["lab", "explain", *run, "--set", "channel=3", "--set", "batch_size=30", "--out", "pages"],
        ["lab", "play", *run, "--out", "pages"],
        ["lab", "figure1", *run, "--set", "steps=2", "--seeds", "1", "--workers", "1", "--out", "pages"],
    ]
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "BatchNorm1d" in said
    assert "20,8" in said  # the shape that bench measured
    (page,) = (folder / "pages").glob("explain.html")
    assert "Network people:hidden as run run has trained it, on a batch of 30 training samples" in page.read_text()
    with torch.no_grad():
        run_again = bn.load_run("run")
        raw = run_again.prepare(X[:9])
        torch.testing.assert_close(run_again.network(raw), found.network(raw))
    assert run_again.classes == ("a", "b", "c")
    assert torch.equal(run_again.load_data().y_test, load_data("data.npz").y_test)
    for arguments, message in (
        (["summary", "--run", "nowhere"], "expected the folder of a run"),
        (["summary", "--run", "run", "--network", "people:first"], "or --run"),
        (["calibrate", "--out", "x.safetensors"], "give either --network or --run"),
        (["calibrate", "--run", "run", "--set", "width=3", "--out", "x.safetensors"], "a run has its own"),
        (["calibrate", "--network", "people:first", "--out", "x.safetensors"], "--network needs --data"),
        (["lab", "play", "--run", "run", "--data", "digits"], "a run has its own"),
        (["lab", "explain", "--run", "run", "--set", "steps=3"], "setting 'steps' does not go with a run"),
        (["lab", "explain", "--run", "run", "--set", "batch_size=97"], "96 training samples do not make one batch"),
        (["bench", "8,4", "--run", "run"], "give either shapes or --run"),
        (["convert", "--from", "c.safetensors", "--to", "x.safetensors"], "--from needs --network"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_other_data_of_a_run_is_prepared_and_numbered_as_its_own(folder, no_exports, capsys):
    x = np.column_stack([X[:, :3], 1.7e9 + RNG.integers(0, 1000, 120)])
    names = np.array(["ant", "bee", "cow"])[CLASSES]
    train(TrainConfig(network="people:hidden", data=saved(x=x, y=names), steps=3, batch_size=20, out="run"))
    run = bn.load_run("run")
    moved = x[CLASSES > 0] + [0, 0, 0, 5000]
    np.savez("later.npz", x=moved, y=names[CLASSES > 0], x_test=moved[:5], y_test=names[CLASSES > 0][:5])
    later = run.load_data("later.npz")
    assert later.classes == ("ant", "bee", "cow")
    assert torch.equal(later.y_train, torch.from_numpy(CLASSES[CLASSES > 0]))
    assert torch.equal(later.x_train, run.prepare(moved))
    assert main(["diagnose", "--run", "run", "--data", "later.npz", "--batch-size", "20", "--json"]) == 0
    capsys.readouterr()
    np.savez("others.npz", x=moved, y=np.where(names == "cow", "dog", names)[CLASSES > 0])
    assert main(["diagnose", "--run", "run", "--data", "others.npz"]) == 2
    assert "y has the label dog, which the run does not know; its labels are ant, bee, cow" in capsys.readouterr().err
    np.savez("narrow.npz", x=moved[:, :3], y=names[CLASSES > 0])
    for command in ("diagnose", "calibrate", "adapt"):
        out = [] if command == "diagnose" else ["--out", "a.safetensors"]
        assert main([command, "--run", "run", "--data", "narrow.npz", *out]) == 2
        assert "the data of the run was a table of 4 features" in capsys.readouterr().err


def test_images_of_a_run_are_divided_by_its_own_scale(folder, no_exports):
    x = RNG.integers(0, 200, (60, 8, 8, 3)).astype(np.float32)
    config = TrainConfig(
        network="people:images", data=saved(x=x, y=np.arange(60) % 2), steps=3, batch_size=20, out="run"
    )
    train(config)
    run = bn.load_run("run")
    np.savez("dark.npz", x=x / 4, y=np.arange(60) % 2, x_test=x[:4] / 4, y_test=np.arange(4) % 2)
    assert torch.equal(run.load_data("dark.npz").x_train, run.prepare(x / 4))
    assert run.load_data("dark.npz").x_train.max() < 0.26
    np.savez("flat.npz", x=x[..., 0], y=np.arange(60) % 2)
    with pytest.raises(DataError, match=r"the data of the run was images \(N, H, W, C\)"):
        run.load_data("flat.npz")


@pytest.mark.parametrize("damage", ["{", "[" * 200_000, '{"config": {}, "data": {}}', "{}"])
def test_a_damaged_run_is_one_error(folder, capsys, damage):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(damage)
    with pytest.raises(DataError, match="damaged or of another version"):
        bn.load_run("run")
    assert main(["train", "--resume", "run"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_arguments_of_a_factory_are_given_or_read_off_the_weights(folder, capsys):
    from safetensors.torch import save_file

    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 7))
    save_file(net.state_dict(), "w.safetensors")
    common = ["--network", "people:first", "--shape", "2,4", "--weights", "w.safetensors"]
    assert main(["summary", *common, "--json"]) == 0
    capsys.readouterr()
    assert main(["fold", *common, "--out", "f.safetensors"]) == 0
    wide = ["--network", "people:hidden", "--shape", "2,4", "--set", "width=5", "--set", "num_outputs=2"]
    capsys.readouterr()
    assert main(["summary", *wide, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["total"] == 4 * 5 + 5 + 5 * 2 + 2 if "total" in shown else True
    for arguments, message in (
        (["--set", "depth=3"], "it has no argument 'depth'; it has num_features, num_outputs, slope, width"),
        (["--set", "width"], "expected NAME=VALUE"),
        (["--set", "width=wide", "--set", "num_outputs=2"], "it raised TypeError"),
    ):
        assert main(["summary", "--network", "people:hidden", "--shape", "2,4", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def made():\n    raise RuntimeError('first\\n  second\\n')", "it raised RuntimeError: first second, at "),
        ("def made():\n    raise KeyError()", "it raised KeyError: no message, at "),
        ("def made():\n    raise SystemExit(3)", "it raised SystemExit: 3, at "),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--mine'])", "cannot be imported (SystemExit: 2, at "),
        ("raise SystemExit", "cannot be imported (SystemExit: no message, at "),
    ],
)
def test_what_a_module_of_networks_raises_is_one_line(folder, capsys, monkeypatch, source, message):
    (folder / "raises.py").write_text(source)
    monkeypatch.delitem(sys.modules, "raises", raising=False)
    importlib.invalidate_caches()
    assert main(["summary", "--network", "raises:made", "--shape", "2,4"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("batchnorm: error: network raises:made: ")
    assert message in last


def test_foreign_values_are_one_error_each():
    for value in ("5", [5], None, 5.5):
        with pytest.raises(InputError, match="batch_size="):
            dataclasses.replace(TrainConfig(), batch_size=value).resolve()
    with pytest.raises(DataError, match="NaN or infinite"):
        classes_of("x", np.array([0.0, np.nan, 1.0]), np.array([0.0]))


def shapes_of_data():
    """By name: samples, labels, the network, and what the run says of the data."""
    images = RNG.integers(0, 256, size=(60, 9, 9, 3)).astype(np.uint8)
    table = np.column_stack([X, np.full(120, 7.0), 1e12 + np.arange(120.0)])
    return {
        "table": (table, CLASSES, "hidden", "Features are shifted in float64"),
        "images": (images, np.arange(60) % 2, "images", "Images are divided by 255"),
        "sequences": (X.reshape(40, 3, 4), np.arange(40) % 2, "recurrent", "Samples are sequences"),
        "regression": (X, X[:, 0] * 100 + 5, "hidden", "Targets are taken as numbers to predict"),
    }


@pytest.mark.parametrize("name", ["table", "images", "sequences", "regression"])
def test_the_command_trains_on_own_data(folder, no_exports, capsys, name):
    """Four shapes of data with own networks; the fifth, 3 GB under a limit of 1 GB, is a row of the suite streams."""
    x, y, network, note = shapes_of_data()[name]
    data = saved(x=x, y=y)
    command = ["train", "--network", f"people:{network}", "--data", data, "--steps", "4", "--batch-size", "16"]
    assert main([*command, "--out", "run"]) == 0, capsys.readouterr().err
    held = json.loads((folder / "run" / "metrics.json").read_text())
    assert held["failure"] is None
    assert any(note in text for text in held["data"]["notes"])
    assert np.isfinite(held["curves"]["batch norm"]["test_loss"]).all()
    with torch.no_grad():
        said = bn.load_run("run")
        assert torch.isfinite(said.network(said.prepare(x[:5]))).all()


UNLABELLED = {
    "x.npy": "a .npy file",
    "alone.npz": "a .npz file of samples",
    "masks.npz": "labels that are masks",
    "objects.npz": "labels that are pickled",
    "table.parquet": "a table of numbers",
    "missing.parquet": "a table whose labels are missing in part",
    "people:alone": "a loader of an array",
    "people:mapping": "a loader of x alone",
    "people:boxes": "a data set whose targets are dicts",
    "people:stream": "batches of samples",
}


class Detection:
    """A data set whose targets are no labels."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return self.rows[k], {"box": k}


@pytest.fixture
def unlabelled(folder, monkeypatch):
    """Sixty rows in every form that has no labels of ours."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x = (2 * RNG.normal(size=(60, 4)) + 1).astype(np.float32)
    np.save("x.npy", x)
    np.savez("alone.npz", x=x)
    np.savez("masks.npz", x=x, y=np.zeros((60, 5, 5), int))
    np.savez("objects.npz", x=x, y=np.array([{"box": 1}] * 60))
    columns = {name: x[:, k] for k, name in enumerate("abcd")}
    pq.write_table(pa.table(columns), "table.parquet")
    pq.write_table(pa.table({**columns, "label": [None, 1] * 30}), "missing.parquet")
    rows = [torch.from_numpy(row) for row in x]
    batches = DataLoader(TensorDataset(torch.from_numpy(x)), batch_size=7)
    people = __import__("people")
    for name, made in (("alone", x), ("mapping", {"x": x}), ("boxes", Detection(rows))):
        monkeypatch.setattr(people, name, lambda made=made: made, raising=False)
    monkeypatch.setattr(people, "stream", lambda: batches, raising=False)
    return torch.from_numpy(x)


@pytest.mark.parametrize("data", UNLABELLED)
def test_what_needs_no_labels_asks_for_none(unlabelled, capsys, data):
    options = ["--network", "people:hidden_norm", "--data", data]
    people = __import__("people")
    people.hidden_norm = lambda num_features: nn.Sequential(nn.BatchNorm1d(num_features))
    assert main(["calibrate", *options, "--batch-size", "60", "--out", "c.safetensors"]) == 0
    assert "All 60 samples are used, without labels: " in capsys.readouterr().err
    state = bn.population.state_dicts.read_state("c.safetensors")
    torch.testing.assert_close(state["0.running_mean"], unlabelled.mean(0))
    torch.testing.assert_close(state["0.running_var"], unlabelled.var(0))
    assert main(["adapt", *options, "--prior", "0", "--batch-size", "60", "--out", "a.safetensors"]) == 0
    adapted = bn.population.state_dicts.read_state("a.safetensors")
    torch.testing.assert_close(adapted["0.running_mean"], unlabelled.mean(0))
    capsys.readouterr()
    assert main(["diagnose", *options, "--batch-size", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["cause"] == "untrained"
    assert main(["train", *options, "--steps", "1"]) == 2


def test_a_run_takes_data_without_labels(unlabelled, no_exports, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: X[:, k] for k, name in enumerate("abcd")}
    pq.write_table(pa.table({**columns, "species": np.array(["a", "b", "c"])[CLASSES]}), "run.parquet")
    config = TrainConfig(
        network="people:hidden", data="run.parquet", labels="species", steps=2, batch_size=20, out="run"
    )
    train(config)
    for data in (*UNLABELLED, "run.parquet"):  # whose column of labels the run knows
        for command in ("calibrate", "adapt"):
            words = [command, "--run", "run", "--data", data, "--batch-size", "60", "--out", f"{command}.safetensors"]
            assert main(words) == 0, data
    held = bn.load_run("run")
    assert held.load_inputs("run.parquet").y is not None
    assert held.load_inputs("x.npy").y is None
    assert len(held.load_inputs("x.npy").x) == 60


def test_a_run_reads_the_columns_of_other_tables_by_name(unlabelled, no_exports, capsys):
    """Features in another order were taken in silence for those of the run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: X[:, k] for k, name in enumerate("abcd")}
    pq.write_table(pa.table({**columns, "y": CLASSES}), "run.parquet")
    train(TrainConfig(network="people:hidden", data="run.parquet", steps=2, batch_size=20, out="run"))
    run = bn.load_run("run")
    assert run.preparation.columns == ("a", "b", "c", "d")
    turned = {"note": ["x"] * len(X), "d": X[:, 3], "y": CLASSES, "b": X[:, 1], "a": X[:, 0], "c": X[:, 2]}
    pq.write_table(pa.table(turned), "turned.parquet")
    del turned["y"]
    pq.write_table(pa.table(turned), "alone.parquet")
    expected = run.load_inputs("run.parquet")
    for found in (run.load_inputs("turned.parquet"), run.load_data("turned.parquet")):
        torch.testing.assert_close(found.x_train if hasattr(found, "x_train") else found.x, expected.x)
    torch.testing.assert_close(run.load_inputs("alone.parquet").x, run.prepare(X))
    for command in ("calibrate", "adapt"):
        for data in ("run", "turned"):
            words = [command, "--run", "run", "--data", f"{data}.parquet", "--batch-size", "60"]
            assert main([*words, "--out", f"{command}-{data}.safetensors"]) == 0
        one, other = (
            bn.population.state_dicts.read_state(f"{command}-{data}.safetensors") for data in ("run", "turned")
        )
        torch.testing.assert_close(one, other)
    del turned["b"], turned["c"]
    pq.write_table(pa.table(turned), "less.parquet")
    capsys.readouterr()
    assert main(["adapt", "--run", "run", "--data", "less.parquet", "--out", "l.safetensors"]) == 2
    assert "it lacks 2 of the run's features: 'b', 'c'; its columns are 'note', 'd', 'a'." in capsys.readouterr().err


def test_weights_of_a_run_point_to_the_run(unlabelled, no_exports, capsys):
    np.savez("labelled.npz", x=X, y=CLASSES)
    train(TrainConfig(network="people:hidden", data="labelled.npz", steps=2, batch_size=20, out="run"))
    capsys.readouterr()
    words = ["summary", "--network", "people:hidden", "--shape", "2,4", "--set", "num_features=4"]
    code = main([*words, "--weights", "run/batchnorm.safetensors"])
    told = capsys.readouterr().err
    assert (code, "--run run in place of --network and --weights" in told) == (2, True), told


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (np.ones(60, int), "every training label is 1, expected two classes or more"),
        (np.arange(60), "60 samples are too few to hold some out of every class"),
        (np.full(60, np.nan), "48 targets of y are NaN"),
        (np.zeros(59, int), "y has shape (59,)"),
    ],
)
def test_labels_that_cannot_be_used_do_not_stop_a_calibration(folder, capsys, labels, why):
    __import__("people").norm = lambda num_features: nn.Sequential(nn.BatchNorm1d(num_features))
    options = ["--network", "people:norm", "--data", saved(x=X[:60], y=labels)]
    assert main(["calibrate", *options, "--batch-size", "60", "--out", "c.safetensors"]) == 0
    told = capsys.readouterr().err
    assert "All 60 samples are used" in told
    assert why in told
    state = bn.population.state_dicts.read_state("c.safetensors")
    torch.testing.assert_close(state["0.running_mean"], torch.from_numpy(X[:60].mean(0)).float())


def test_labels_that_are_named_have_to_be_there(folder, capsys):
    np.save("x.npy", X)
    for data, labels, message in (("x.npy", "y.npy", "y.npy"), ("data.npz", "y", "goes with a .npy file only")):
        saved(x=X)
        words = ["calibrate", "--network", "people:first", "--data", data, "--labels", labels, "--out", "c.safetensors"]
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_table_of_a_large_mean_is_not_shifted_for_a_network_that_is_there(folder):
    __import__("people").norm = lambda num_features: nn.Sequential(nn.BatchNorm1d(num_features))
    x = np.column_stack([X[:, 0], 1.7e9 + RNG.integers(0, 1000, 120)])
    for arrays in ({"x": x}, {"x": x, "y": CLASSES}):
        words = ["calibrate", "--network", "people:norm", "--data", saved(**arrays), "--batch-size", "24"]
        assert main([*words, "--out", "c.safetensors"]) == 0
        mean = bn.population.state_dicts.read_state("c.safetensors")["0.running_mean"]
        assert mean[1].item() == pytest.approx(1.7e9, rel=1e-6)
