"""The whole way: from a plain network to a proven one, in one run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import BatchNormError, DataError, InputError, SurgeryError
from batchnorm.training import Interrupted, TrainConfig, procedure2, resume, train

SMALL = TrainConfig(data="digits", steps=30, batch_size=32, eval_every=10, lr=0.5)


@pytest.fixture
def no_exports(monkeypatch):
    """The exporters take seconds; these tests are about what comes before them."""
    monkeypatch.setattr(procedure2, "export_network", lambda *arguments: [])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(dataclasses.replace(SMALL, out=str(folder)))


def test_the_run_folder_has_everything(run):
    files = {path.name for path in run.folder.iterdir()}
    assert files == {
        "config.json",
        "metrics.json",
        "certificate.json",
        "checkpoint.pt",
        "model.safetensors",
        "batchnorm.safetensors",
        "model.pt2",
        "batchnorm.pt2",
        "model.onnx",
    }
    assert run.ok
    assert {export.status for export in run.exports} == {"verified"}
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["curves"]["batch norm"]["steps"] == [0, 10, 20, 30]
    assert metrics["exports"][0]["relative_difference"] <= 1e-5
    config = json.loads((run.folder / "config.json").read_text())
    assert config["config"]["lr"] == 0.5
    assert config["data"]["training_samples"] == run.data["training_samples"]
    certificate = json.loads((run.folder / "certificate.json").read_text())
    assert len(certificate["folded"]) == 3


def test_it_says_what_was_inserted(run):
    assert [(i.after, i.num_features, i.bias_removed) for i in run.insertions] == [
        ("1", 100, True),
        ("3", 100, True),
        ("5", 100, True),
    ]
    assert list(run.skipped) == ["7"]
    assert run.parameters["batch norm"] - run.parameters["baseline"] == 300  # gamma for each bias
    names = dict(run.network.named_modules())
    assert all(isinstance(names[i.layer], nn.BatchNorm1d) for i in run.insertions)


def test_both_networks_start_from_the_same_weights(run):
    curves = run.curves
    assert curves["batch norm"].steps == curves["baseline"].steps
    network = procedure2._Run.build(SMALL.resolve(), None).contenders
    weights = [
        [m.weight for m in network[name].network.modules() if isinstance(m, nn.Linear)]
        for name in ("batch norm", "baseline")
    ]
    assert len(weights[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_probe_is_the_last_hidden_activations_input():
    contenders = procedure2._Run.build(SMALL.resolve(), None).contenders
    assert contenders["baseline"].probe.module == "5"
    norm = contenders["batch norm"].network.get_submodule(contenders["batch norm"].probe.module)
    assert isinstance(norm, nn.BatchNorm1d)


def test_after_the_activation_the_probe_is_the_layer_itself():
    config = dataclasses.replace(SMALL, placement="after_activation").resolve()
    contenders = procedure2._Run.build(config, None).contenders
    for one in contenders.values():
        assert isinstance(one.network.get_submodule(one.probe.module), nn.Linear)


def test_the_finished_network_is_calibrated_frozen_and_folded(run):
    calibration = run.calibration
    assert calibration.samples == run.data["training_samples"]
    assert [layer.layer for layer in calibration.layers] == [i.layer for i in run.insertions]
    assert all(0 < layer.variance_ratio_min <= layer.variance_ratio_max for layer in calibration.layers)
    assert all(layer.mean_shift > 0 for layer in calibration.layers)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in run.folded.modules())
    with torch.no_grad():
        before = run.network.eval()(run.example)
        run.network.train()(run.example + 100)
        assert torch.equal(run.network(run.example), before)
        difference = (run.folded(run.example) - before).abs().max() / before.abs().max()
    assert difference <= 1e-5


def test_calibration_is_over_the_training_part(no_exports, tmp_path):
    found = train(dataclasses.replace(SMALL, out=str(tmp_path / "a"), steps=3))
    data = procedure2.load_data("digits", seed=0)
    first = nn.Sequential(*list(found.network.children())[:1])
    linear, norm = [m for m in found.network.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)][:2]
    with torch.no_grad():
        inputs = linear(first(data.x_train)).double()
    torch.testing.assert_close(norm.running_mean.double(), inputs.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), inputs.var(0), rtol=1e-4, atol=1e-6)


def measured(result):
    return {n: dataclasses.replace(c, seconds=0.0) for n, c in result.curves.items()}


def weights(result):
    return {**result.network.state_dict(), **{f"f.{k}": v for k, v in result.folded.state_dict().items()}}


def same(a, b):
    a_state, b_state = weights(a), weights(b)
    return (
        measured(a) == measured(b)
        and a_state.keys() == b_state.keys()
        and all(torch.equal(a_state[k], b_state[k]) for k in a_state)
    )


def test_a_seed_gives_the_same_bits_again(run, no_exports, tmp_path):
    again = train(dataclasses.replace(SMALL, out=str(tmp_path / "a")))
    assert same(run, again)
    other = train(dataclasses.replace(SMALL, out=str(tmp_path / "b"), seed=1))
    assert not same(run, other)


class StopAt:
    """Ctrl-C after one step."""

    def __init__(self, at):
        self.at = at

    def stage(self, text):
        pass

    def step(self, step, steps, curves):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_resumes_to_the_same_bits(run, no_exports, tmp_path):
    folder = tmp_path / "run"
    config = dataclasses.replace(SMALL, out=str(folder))
    with pytest.raises(Interrupted, match=rf"Go on with: batchnorm train --resume {folder}"):
        train(config, progress=StopAt(13))
    assert {path.name for path in folder.iterdir()} == {"config.json", "checkpoint.pt"}
    assert same(run, resume(folder))
    assert same(run, resume(folder))  # a finished run only finishes again


def test_ctrl_c_after_the_training_loses_nothing(run, no_exports, tmp_path, monkeypatch):
    def press(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(procedure2, "calibrate", press)
        with pytest.raises(Interrupted, match="--resume"):
            train(dataclasses.replace(SMALL, out=str(tmp_path / "run")))
    assert same(run, resume(tmp_path / "run"))


def test_a_finished_run_can_be_trained_for_longer(run, no_exports, tmp_path):
    folder = tmp_path / "run"
    train(dataclasses.replace(SMALL, out=str(folder), steps=20))
    assert same(run, resume(folder, steps=30))
    with pytest.raises(InputError, match="30 steps are done, steps=10 asks for fewer"):
        resume(folder, steps=10)


def test_threads_are_put_back(no_exports, tmp_path):
    torch.set_num_threads(2)
    train(dataclasses.replace(SMALL, out=str(tmp_path / "a"), steps=1, threads=1))
    assert torch.get_num_threads() == 2


def test_divergence_is_recorded_and_nothing_is_exported(tmp_path):
    config = dataclasses.replace(SMALL, out=str(tmp_path / "a"), lr=1e38, baseline_lr=0.1)
    found = train(config)
    assert found.diverged
    assert not found.ok
    curve = found.curves["batch norm"]
    assert 1 < curve.diverged_at <= 30
    assert found.curves["baseline"].diverged_at is None
    assert found.curves["baseline"].steps[-1] == 30
    assert (found.calibration, found.folded, found.exports) == (None, None, [])
    metrics = json.loads((found.folder / "metrics.json").read_text())
    assert metrics["curves"]["batch norm"]["diverged_at"] == curve.diverged_at


def test_a_network_that_cannot_be_calibrated_still_has_its_curves(tmp_path):
    found = train(dataclasses.replace(SMALL, out=str(tmp_path / "a"), lr=1e30, baseline=False))
    assert "overflow" in found.failure
    assert not found.ok
    assert found.exports == []
    metrics = json.loads((found.folder / "metrics.json").read_text())
    assert metrics["failure"] == found.failure
    assert metrics["curves"]["batch norm"]["steps"][-1] == 30


def test_a_refused_fold_exports_the_unfolded_network(tmp_path, monkeypatch):
    def refuse(network, example):
        raise SurgeryError("fold: no")

    monkeypatch.setattr(procedure2, "fold", refuse)
    found = train(dataclasses.replace(SMALL, out=str(tmp_path / "a"), steps=2, baseline=False))
    assert (found.fold_refusal, found.folded, found.certificate) == ("fold: no", None, None)
    assert not (found.folder / "certificate.json").exists()
    assert {export.status for export in found.exports} == {"verified"}, found.exports


def test_a_table_is_standardized_by_the_first_layer(no_exports, tmp_path):
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = generator.normal(size=(120, 4)) * [1e-3, 1, 1e3, 1] + [0, 5, 1e4, 0] + y[:, None] * [0, 1, 0, 2]
    x[:, 3] = 7.0  # a constant feature
    np.savez(tmp_path / "table.npz", x=x, y=y)
    config = TrainConfig(data=str(tmp_path / "table.npz"), out=str(tmp_path / "a"), steps=20, batch_size=16)
    found = train(config)
    first = next(iter(found.network.children()))
    assert isinstance(first, batchnorm.Standardize)
    data = procedure2.load_data(config.data)
    scaled = first(data.x_train)[:, :3]
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(scaled.std(0, unbiased=False), torch.ones(3), atol=1e-2, rtol=0)
    assert [layer.layer for layer in found.calibration.layers] == [i.layer for i in found.insertions]
    assert found.certificate.relative <= 1e-5


@pytest.mark.parametrize("method", ["ioffe", "sequential"])
def test_every_method_calibrates(no_exports, tmp_path, method):
    config = dataclasses.replace(SMALL, out=str(tmp_path / "a"), steps=2, method=method)
    found = train(config)
    whole = found.data["training_samples"]
    assert found.calibration.samples == (whole // 32 * 32 if method == "ioffe" else whole)


def test_batch_norm_after_the_activation(tmp_path):
    config = dataclasses.replace(SMALL, out=str(tmp_path / "a"), steps=5, placement="after_activation", baseline=False)
    found = train(config)
    assert list(found.curves) == ["batch norm"]
    assert not any(insertion.bias_removed for insertion in found.insertions)
    assert {export.status for export in found.exports} == {"verified"}, found.exports


def test_a_network_and_data_of_the_users(no_exports, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    config = TrainConfig(network="waves:network", data="waves:load", steps=5, out=str(tmp_path / "a"))
    found = train(config)
    assert [i.after for i in found.insertions] == ["0", "2.first", "2.second"]
    assert list(found.curves) == ["batch norm"]  # no baseline unless asked for
    sys.modules.pop("waves")


MODULE = """
import torch
from torch import nn

def nothing(): return nn.Sequential(nn.Flatten(), nn.ReLU())
def deaf(): return nn.Sequential(nn.Flatten(), nn.Linear(3, 10))
def narrow(num_features): return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 5), nn.ReLU(), nn.Linear(5, 2))
def flat(num_features): return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 1), nn.Flatten(0))
def alone(num_features): return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 10))
def broken(): raise RuntimeError("no luck")
def own(num_features):
    return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 10))
"""


def test_a_network_that_comes_with_batch_norm_is_trained_as_it_is(no_exports, tmp_path, monkeypatch):
    (tmp_path / "users.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("users", None)
    found = train(dataclasses.replace(SMALL, network="users:own", out=str(tmp_path / "run")))
    assert found.insertions == []
    assert found.skipped == {"1": "it is normalized already", "4": "it is an output layer"}
    assert [folded.layer for folded in found.certificate.folded] == ["2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "users:nothing"}, r"returns \(32, 64\), expected|nothing to normalize"),
        ({"network": "users:alone"}, "nothing to normalize"),
        ({"network": "users:deaf"}, r"does not take the data's batches of shape \(32, 1, 8, 8\)"),
        ({"network": "users:narrow"}, r"returns \(32, 2\), expected logits of shape \(32, 10\)"),
        ({"network": "users:flat"}, r"returns \(32,\), expected"),
        ({"network": "users:broken"}, "RuntimeError: no luck"),
        ({"network": "users:own", "baseline": True}, "its own batch norm, which is trained as it is"),
        ({"network": "users:own", "placement": "after_activation"}, "no other --placement"),
        ({"network": "users:missing"}, "missing does not exist in module users"),
        ({"batch_size": 2000}, "do not make one batch of 2000"),
        ({"batch_size": 1}, "batch_size=1, expected 2 or more"),
        ({"steps": 0}, "steps=0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"baseline_lr": 0.0}, "baseline_lr=0.0"),
        ({"momentum": 1.0}, r"momentum=1.0, expected a number in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"threads": 0}, "threads=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"optimizer": "lbfgs"}, "optimizer='lbfgs', expected one of sgd, adam"),
        ({"placement": "before"}, "placement='before'"),
        ({"method": "mean"}, "method='mean'"),
        ({"device": "nowhere"}, "device='nowhere' cannot be used"),
        ({"data": "nothing.npz"}, "nothing.npz: it cannot be read"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(tmp_path, monkeypatch, changes, message):
    (tmp_path / "users.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("users", None)
    config = dataclasses.replace(SMALL, **{"out": str(tmp_path / "run"), **changes})
    with pytest.raises(BatchNormError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_never_overwritten_unasked(run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    with pytest.raises(InputError, match="not empty"):
        train(dataclasses.replace(SMALL, out=str(run.folder)))
    assert {path: path.stat().st_mtime_ns for path in run.folder.iterdir()} == before


def test_overwriting_leaves_nothing_of_the_old_run(no_exports, tmp_path):
    """Nor does it remove what is no file of a run."""
    (tmp_path / "config.json").write_text('{"config": {}, "data": {}}')
    ours = ["model.onnx", "report.html", "checkpoint-3/shard-00000.safetensors"]
    others = ["notes.txt", "checkpoint-500/model.safetensors", "checkpoint-best/shard-1"]
    for name in ours + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    train(dataclasses.replace(SMALL, out=str(tmp_path), steps=1, overwrite=True))
    assert not [name for name in ours if (tmp_path / name).exists()]
    assert [(tmp_path / name).read_text() for name in others] == others


def test_the_default_folder_is_numbered(no_exports, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        found = train(dataclasses.replace(SMALL, steps=1, baseline=False))
        assert str(found.folder) == f"runs/figure1-digits-{number}"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "damaged"), ('{"config": {"lr": 1}}', "damaged")],
)
def test_resuming_what_is_no_run_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=message):
        resume(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes self.recurrent._flat_weights:UserWarning")  # of torch.nn.LSTM
def test_a_recurrent_network_on_sequences(tmp_path):
    """Normalized over the valid frames of whole sequences, folded into torch's own layer, and every form verified."""
    config = TrainConfig(network="lstm", data="japanese-vowels", steps=40, batch_size=30, out=str(tmp_path / "run"))
    run = train(dataclasses.replace(config, eval_every=20))
    assert run.ok, [export.note for export in run.exports]
    assert [item.into for item in run.certificate.folded] == ["recurrent.weight_ih_l0"]
    assert not list(run.folded.recurrent.children())
    assert [insertion.after for insertion in run.insertions] == ["recurrent.weight_ih_l0"]
    assert run.curves["batch norm"].test_accuracy[-1] > 0.8  # 0.11 by chance
    statuses = {export.file: export.status for export in run.exports}
    assert statuses.pop("batchnorm.pt2") == "not written"  # the mask of its padding depends on the values
    assert set(statuses.values()) == {"verified"}
