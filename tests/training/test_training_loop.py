"""The loop: batches, measurements, divergence, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import signal

import pytest
import torch
from torch import nn

from batchnorm.errors import DataError
from batchnorm.training.config import TrainConfig
from batchnorm.training.datasets import Dataset
from batchnorm.training.loop import (
    Contender,
    Interrupted,
    Probe,
    batch_indices,
    evaluate,
    load_checkpoint,
    make_optimizer,
    save_checkpoint,
    train_steps,
)

CONFIG = TrainConfig(steps=23, batch_size=8, eval_every=5, lr=0.1, momentum=0.5).resolve()


def make_data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(40) % 3
    x = torch.randn(40, 5, generator=generator) + y[:, None]
    return Dataset("toy", x[:30], y[:30], x[30:], y[30:], 3, False, ())


def contender(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    return Contender(network, make_optimizer(network, config, config.lr), Probe("1", 1, 2))


def test_a_pass_meets_every_sample_once_and_the_next_in_another_order():
    first = torch.cat([batch_indices(30, 10, 0, step) for step in range(3)])
    second = torch.cat([batch_indices(30, 10, 0, step) for step in range(3, 6)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(30))
    assert first.tolist() != second.tolist()
    assert torch.equal(batch_indices(30, 10, 0, 1), first[10:20])
    assert not torch.equal(batch_indices(30, 10, 1, 1), first[10:20])


def test_an_incomplete_batch_is_left_out():
    assert [len(batch_indices(30, 8, 0, step)) for step in range(7)] == [8] * 7


def test_weight_decay_acts_on_weights_alone():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Conv2d(1, 1, 1))
    config = dataclasses.replace(CONFIG, weight_decay=0.1)
    for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.AdamW)):
        optimizer = make_optimizer(network, dataclasses.replace(config, optimizer=name), 0.1)
        assert type(optimizer) is kind
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(decays) == len(list(network.parameters()))
        for parameter in network.parameters():
            assert decays[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_evaluate_measures_the_test_part_and_changes_nothing():
    data, network = make_data(), contender().network
    network[2].eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    loss, accuracy, percentiles = evaluate(network, data, Probe("1", 1, 2))
    assert [m.training for m in network] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    network.eval()
    with torch.no_grad():
        logits = network(data.x_test)
        unit = network[:2](data.x_test)[:, 2].double()
    expected = nn.functional.cross_entropy(logits.double(), data.y_test)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert accuracy == float((logits.argmax(1) == data.y_test).double().mean())
    wanted = [float(unit.quantile(q)) for q in (0.15, 0.5, 0.85)]
    assert percentiles == pytest.approx(wanted, rel=1e-6)


def test_evaluate_goes_through_all_batches(monkeypatch):
    data, network = make_data(), contender().network
    whole = evaluate(network, data, Probe("1", 1, 2))
    monkeypatch.setattr("batchnorm.training.loop.EVALUATION_BATCH", 4)
    parts = evaluate(network, data, Probe("1", 1, 2))
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1] == whole[1]
    assert parts[2] == pytest.approx(whole[2], rel=1e-6)


def test_the_curve_has_every_measurement(tmp_path):
    one = contender()
    train_steps({"a": one}, make_data(), CONFIG, tmp_path / "checkpoint.pt")
    curve = one.curve
    assert curve.steps == [0, 5, 10, 15, 20, 23]
    assert curve.train_loss[0] is None
    assert all(math.isfinite(loss) for loss in curve.train_loss[1:])
    assert curve.best_accuracy == max(curve.test_accuracy)
    assert curve.first_step_at(2.0) is None
    assert curve.first_step_at(0.0) == 0


def test_contenders_meet_the_same_batches(tmp_path):
    seen = {"a": [], "b": []}
    contenders = {name: contender() for name in seen}
    for name, one in contenders.items():
        one.network[0].register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0].sum()) if m.training else None
        )
    train_steps(contenders, make_data(), CONFIG, tmp_path / "checkpoint.pt")
    assert len(seen["a"]) == CONFIG.steps
    assert seen["a"] == seen["b"]


def states(one):
    return {**one.network.state_dict(), "curve": one.curve}


def equal(a, b):
    a, b = states(a), states(b)
    curve_a, curve_b = (dataclasses.replace(s.pop("curve"), seconds=0.0) for s in (a, b))
    return curve_a == curve_b and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [1, 10, 17])
def test_resumed_training_ends_in_the_same_bits(tmp_path, optimizer, stop):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, weight_decay=0.01)
    data, path = make_data(), tmp_path / "checkpoint.pt"
    whole, handler = contender(config), signal.getsignal(signal.SIGINT)
    train_steps({"a": whole}, data, config, path)

    class Stop:
        def step(self, step, steps, curves):
            if step == stop:
                os.kill(os.getpid(), signal.SIGINT)

    first = contender(config)
    with pytest.raises(Interrupted, match=f"stopped by Ctrl-C after step {stop} of 23"):
        train_steps({"a": first}, data, config, path, progress=Stop())
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = contender(config, seed=99)
    start = load_checkpoint(path, {"a": resumed}, data)
    assert start == stop
    assert equal(resumed, first)
    train_steps({"a": resumed}, data, config, path, start=start)
    assert equal(resumed, whole)


def test_a_diverged_contender_stops_and_the_other_goes_on(tmp_path):
    good, bad = contender(), contender()
    seen = []

    def poison(module, args):
        seen.append(bad.network[3].weight.detach().clone())
        return args[0] * float("inf") if len(seen) == 7 else None

    bad.network[3].register_forward_pre_hook(lambda m, a: poison(m, a) if m.training else None)
    train_steps({"good": good, "bad": bad}, make_data(), CONFIG, tmp_path / "checkpoint.pt")
    assert (good.curve.diverged_at, bad.curve.diverged_at) == (None, 7)
    assert bad.curve.steps == [0, 5]
    assert good.curve.steps[-1] == 23
    assert torch.equal(bad.network[3].weight, seen[-1])


def test_checkpoints_hold_no_code_and_fit_one_run_only(tmp_path):
    data, path = make_data(), tmp_path / "checkpoint.pt"
    one = contender()
    save_checkpoint(path, 4, {"a": one}, data)
    torch.load(path, weights_only=True)
    with pytest.raises(DataError, match="other data"):
        load_checkpoint(path, {"a": one}, make_data(seed=1))
    with pytest.raises(DataError, match=r"it holds \['a'\], expected \['b'\]"):
        load_checkpoint(path, {"b": one}, data)
    other = Contender(nn.Linear(5, 3), one.optimizer, one.probe)
    with pytest.raises(DataError, match="does not fit the network a"):
        load_checkpoint(path, {"a": other}, data)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 nothing", b"\x80\4}."])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"checkpoint\.pt: it cannot be read"):
        load_checkpoint(tmp_path / "checkpoint.pt", {"a": contender()}, make_data())
