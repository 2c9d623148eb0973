"""A watch reads what is so, tells what is wrong and its repair, keeps its budget, and leaves the training as it was."""

from __future__ import annotations

import copy
import json
import math
import pickle
import time

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.diagnosis.alerts import Rules, parse_rule
from batchnorm.errors import InputError, MissingDependencyError


def network(kind=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), kind(8), nn.ReLU(), nn.Linear(8, 8), kind(8), nn.Linear(8, 2))


def train(net, steps, watch=None, optimizer=None, x=None):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        given = torch.randn(16, 4, generator=generator) if x is None else x
        optimizer.zero_grad()
        loss = net(given).square().mean()
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch.step(loss)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_each_number_is_what_it_says(kind):
    net = network(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(16, 4)
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        z = net[0](x).double()
    before = net[1].running_mean.double().clone(), net[1].running_var.double().clone()
    rate = 0.1 / net[0].weight.detach().double().square().sum()
    gamma = net[1].weight.detach().abs().mean()
    with bn.watch(net, optimizer=optimizer, every=1) as watch:
        optimizer.zero_grad()
        net(x).square().sum().backward()
        gradient = net[1].weight.grad.norm()
    first = watch.readings[0].layers[0]
    mean, var, eps = z.mean(0), z.var(0, correction=0), net[1].eps
    off, ratio = (mean - before[0]) / (before[1] + eps).sqrt(), (var + eps) / (before[1] + eps)
    assert first.distance == pytest.approx(float(((ratio + off**2 - 1 - ratio.log()) / 2).mean()), rel=1e-4)
    assert first.mean_off == pytest.approx(float(off.square().mean().sqrt()), rel=1e-4)
    assert first.rate == pytest.approx(float(rate), rel=1e-5)
    assert first.gamma == pytest.approx(float(gamma), rel=1e-5)
    assert first.gamma_gradient == pytest.approx(float(gradient), rel=1e-5)
    assert (first.name, first.channels, first.dead, first.constant, first.padding) == ("1", 8, 0, 0, 0)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_the_training_is_the_same_and_no_hook_stays(kind):
    plain, watched = network(kind), network(kind)
    train(plain, 5)
    with bn.watch(watched, every=2) as watch:
        train(watched, 5, watch)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert [reading.step for reading in watch.readings] == [1, 3, 5]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    assert all(p._backward_hooks is None or not p._backward_hooks for p in watched.parameters())


def test_evaluation_and_copies_are_not_read():
    net = network()
    with bn.watch(net, every=1) as watch:
        net.eval()(torch.randn(4, 4))
        copy.deepcopy(net).train()(torch.randn(4, 4))
        pickle.loads(pickle.dumps(net)).train()(torch.randn(4, 4))
        with torch.no_grad():
            net.train()(torch.randn(4, 4))
    assert watch.steps == 0
    bn.fold(net.eval(), torch.randn(4, 4))


class Trouble(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.still = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=0.0)

    def forward(self, x):
        return self.still(self.norm(x))


@pytest.mark.filterwarnings("ignore:watch:UserWarning")
def test_trouble_is_told_once_with_the_repair():
    net = Trouble()
    x = torch.randn(8, 3, 12)
    x[:, :, 7:] = 0
    x[:, 1] = 2
    with bn.watch(net, every=1) as watch:
        for _ in range(3):
            net(x).sum().backward()
    reading = watch.readings[-1].layers[0]
    assert reading.padding == pytest.approx(5 / 12)
    assert reading.constant == 1
    assert watch.readings[-1].layers[1].sticking
    assert not reading.sticking
    told = "\n".join(watch.warnings)
    assert "'norm', 'still': channels have one and the same value" in told
    assert "bn.mask_padding(net, lengths)" in told
    assert "'still': running statistics have not moved since the last reading: its momentum is 0" in told
    assert len(watch.warnings) == len(set(watch.warnings)) == told.count("step ")


@pytest.mark.filterwarnings("ignore:watch:UserWarning")
def test_refused_batches_and_distances_are_told():
    net = nn.Sequential(bn.BatchNorm1d(4, nonfinite="skip"), nn.Linear(4, 2))
    with bn.watch(net, every=1) as watch:
        for k in range(40):
            x = torch.randn(16, 4)
            if k == 20:
                x[0, 0] = torch.inf
            net(x if k < 39 else 9 * x + 30).sum().backward()
    assert [reading.layers[0].skipped for reading in watch.readings].count(1) == 1
    assert any("were refused" in text for text in watch.warnings)
    assert any("nats from the batch's" in text and "bn.calibrate" in text for text in watch.warnings)


def test_the_budget_is_kept():
    net = network()
    with bn.watch(net, budget=0.05) as watch:
        for _ in range(60):
            time.sleep(0.004)
            net(torch.randn(16, 4)).sum().backward()
    assert 1 <= len(watch.readings) < 60
    assert watch.cost <= 0.05 + 2 * watch._last_cost / watch._elapsed


def test_rules():
    rule = parse_rule("gap > 1 nat for 3 evaluations")
    assert (rule.metric, rule.sign, rule.limit, rule.times) == ("gap", ">", 1.0, 3)
    assert parse_rule("padding >= 5 %").limit == 0.05
    assert parse_rule("Gamma gradient < 1e-3").metric == "gamma_gradient"
    rules = Rules([rule])
    values = [2, 2, 0.5, 2, 2, 2, 2, math.nan]
    assert [len(rules.see(k, {"gap": value})) for k, value in enumerate(values)] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert not rules.see(9, {"other": 5.0})
    for wrong in ("gap", "gap > x", "> 1", "gap = 1", "gap > 1 for 0 evaluations", 3):
        with pytest.raises(InputError, match=r"watch: .*rule"):
            parse_rule(wrong)


def test_alerts_reach_who_asked_and_gaps_are_measured():
    net, heard = network(), []
    with bn.watch(net, every=1, alerts=["gap > 1 nat for 2 evaluations", "loss < 0"], on_alert=heard.append) as watch:
        for loss in (1.0, 3.0, 4.0):
            train(net, 2, watch)
            watch.evaluated(loss, training_loss=0.5)
        assert watch.evaluated(2.0, accuracy=0.5).values == {"loss": 2.0, "accuracy": 0.5}
    assert [str(alert.rule.text) for alert in heard] == ["gap > 1 nat for 2 evaluations"]
    assert heard[0].step == 6
    with bn.watch(net, every=1, alerts="gap > 1") as watch, pytest.warns(UserWarning, match="alert at step 0"):
        watch.evaluated(9.0, training_loss=1.0)


def test_files_and_the_page(tmp_path):
    class Writer:
        def __init__(self):
            self.tags = set()

        def add_scalar(self, tag, value, step):
            self.tags.add(tag)

    net, writer = network(), Writer()
    page, lines = tmp_path / "deep" / "watch.html", tmp_path / "watch.jsonl"
    with bn.watch(net, every=1, page=page, jsonl=lines, tensorboard=writer) as watch:
        assert "http-equiv" in page.read_text()
        train(net, 3, watch)
        watch.evaluated(3.0, training_loss=float("inf"))
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["kind"] for record in records] == ["reading"] * 3 + ["evaluation"]
    assert records[-1]["values"]["gap"] is None
    assert {"batchnorm/distance", "1/distance", "4/gamma_gradient", "batchnorm/gap"} <= writer.tags
    text = page.read_text()
    assert "The watch has ended" in text
    assert "http-equiv" not in text
    losses = [record["values"]["loss"] for record in records[:3]]
    said = (
        f"From {losses[0]:.3g} to {losses[-1]:.3g}, between {min(losses):.3g} and {max(losses):.3g}, in steps 1 to 3."
    )
    assert f"<figcaption>{said}</figcaption>" in text
    assert "script" not in text
    assert all(name in watch.report() for name in ("distance, nats", "3 readings in 3 steps"))


def test_what_cannot_be_watched(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no batch normalization"):
        bn.watch(nn.Linear(2, 2))
    with pytest.raises(InputError, match="compiled"):
        bn.watch(torch.compile(network()))
    with pytest.raises(InputError, match="budget"):
        bn.watch(network(), budget=0)
    with pytest.raises(InputError, match="every"):
        bn.watch(network(), every=0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="jsonl"):
        bn.watch(network(), jsonl=tmp_path / "file" / "x.jsonl")
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        bn.watch(network(), tensorboard=tmp_path)
