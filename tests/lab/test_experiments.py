"""Every experiment runs in small, on the built-in networks and on the user's, and its page holds what it found."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import lab
from batchnorm.cli import main
from batchnorm.errors import DataError, InputError
from batchnorm.lab.experiment import Experiment, Measure, accuracy_panel
from batchnorm.lab.experiments import EXPERIMENTS
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial, difference, settled
from batchnorm.lab.runner import _digest
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.report import drawing, write_gallery
from batchnorm.training.datasets import make_data
from batchnorm.training.loop import Interrupted


def plain(num_features, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 12), nn.ReLU(), nn.Linear(12, num_classes))


def normalized(num_features, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(num_features, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, num_classes)
    )


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(120, 1, 4, 4, generator=generator)
    return x, (x.flatten(1)[:, :3]).argmax(1)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke(name, tmp_path):
    experiment = EXPERIMENTS[name]
    assert getattr(lab, name) is experiment
    first = experiment(seeds=2, folder=tmp_path, **experiment.smoke)
    assert first.seeds == (0, 1)
    assert any(
        finding.kind != "note"
        for finding in experiment.verdict(experiment.configure(**experiment.smoke), Table(first.trials))
    )
    assert {finding.kind for finding in first.findings} == {"note"}  # two seeds reproduce nothing
    assert any("2 seeds: a verdict needs 5." in finding.text for finding in first.findings)
    for finding in first.findings:
        assert not re.search(r"\bnan\b", finding.text), finding.text
    for panel in experiment.panels:
        held = {"map": first.trials[0].maps, "lines": first.trials[0].curves}
        assert panel.name in held.get(panel.kind, {}) or Table(first.trials).arms(panel.name), panel.name
    for measure in experiment.measures:
        assert Table(first.trials).arms(measure), measure
    again = experiment(seeds=2, folder=tmp_path, **experiment.smoke)  # from the kept seeds
    assert json.dumps([dataclasses.asdict(t) for t in again.trials]) == json.dumps(
        [dataclasses.asdict(t) for t in first.trials]
    )
    page = write_gallery(tmp_path / "page.html", [experiment], [first], images=tmp_path / "images").read_text()
    assert experiment.question in html.unescape(page)
    assert page.count("<svg") == 2  # for a wide screen and for a phone
    assert "Source of the claim" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    light, dark = ((tmp_path / "images" / f"{name}-{ground}.svg").read_text() for ground in ("light", "dark"))
    assert light.startswith("<?xml")
    assert drawing.COLORS["text"] in light
    assert drawing.COLORS["text"] not in dark


def run_small(**options):
    return lab.figure1(seeds=1, steps=6, batch_size=20, **options)


def test_the_users_network_and_data():
    own = run_small(network=normalized, data=data)
    assert own.config["network"].endswith(":normalized")
    assert set(own.trials[0].values) == {"batch norm", "without"}
    assert run_small(network=plain, data=data, insert=True).trials[0].values
    with pytest.raises(InputError, match=r"bn\.insert"):
        run_small(network=plain, data=data)
    with pytest.raises(InputError, match="factory"):
        run_small(network=nn.Linear(2, 2), data=data)
    with pytest.raises(DataError, match="batch_size"):
        lab.figure1(seeds=1, steps=6, batch_size=500, network=normalized, data=data)


@pytest.mark.parametrize("folder", ["mine", "mine/deep/lab"])
def test_a_file_in_place_of_the_folder_is_told_before_anything_is_computed(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("kept")
    monkeypatch.setattr("batchnorm.lab.runner._work", lambda job: pytest.fail("it computes"))
    assert main(["lab", "equalities", "--quick", "--seeds", "1", "--out", folder]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"batchnorm: error: lab: output folder {folder}: ")
    assert last.endswith("mine is a file. Give another folder (--out).")
    assert Path("mine").read_text() == "kept"


class Returns(nn.Module):
    """A network whose forward makes something else of logits and inputs."""

    def __init__(self, net, what):
        super().__init__()
        self.net, self.what = net, what

    def forward(self, x):
        return self.what(self.net(x))


class TakesTwo(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        return self.net(x + y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: Returns(net, lambda y: {"logits": y}), r"an object of type dict, expected logits of shape \(8, "),
        (lambda net: Returns(net, lambda y: (y, y)), r"it returns an object of type tuple, expected logits"),
        (lambda net: Returns(net, lambda y: y[:, :1]), r"it returns \(8, 1\), expected logits"),
        (TakesTwo, r"it does not take the data's batches of shape \(8, .*missing 1 required"),
    ],
)
def test_networks_that_the_lab_cannot_judge(make, message):
    def network(num_features, num_classes):
        return make(normalized(num_features, num_classes))

    with pytest.raises(InputError, match=message):
        run_small(network=network, data=data)


@pytest.mark.parametrize("network", [normalized, "figure1"])
def test_both_networks_start_from_the_same_weights(network):
    task = Task("x", Config(network=network, data=data, batch_size=20), 3)
    with_norm, without = task.normalized(), task.plain()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in without.modules())
    first, second = ([p for p in net.parameters() if p.ndim == 2] for net in (with_norm, without))
    assert len(first) == len(second) > 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert with_norm.get_submodule(task.probe) is not None
    assert without.get_submodule(task.probe) is not None


def test_a_divergence_is_recorded():
    found = run_small(network=normalized, data=data, lr=1e38)
    trial = found.trials[0]
    assert trial.diverged
    for arm in trial.diverged:
        assert trial.values[arm]["final"] == pytest.approx(1 / 3)
    assert any("diverged" in finding.text for finding in found.findings)


def counting(calls, stop_at=None):
    def trial(config, task):
        if task.seed == stop_at:
            raise KeyboardInterrupt
        calls.append(task.seed)
        out = Trial(task.seed)
        out.add("arm", value=math.inf if task.seed else math.nan)
        return out

    return Experiment(
        name="counting", title="", question="", setting="", criterion="", source="", config=Config(data=data),
        trial=trial, verdict=lambda config, table: [], panels=(accuracy_panel(),), measures={"value": Measure("v")},
        caption="",
    )  # fmt: skip


def test_an_interrupted_run_goes_on(tmp_path):
    calls = []
    with pytest.raises(Interrupted, match="2 of 4 seeds done"):
        lab.run(counting(calls, stop_at=2), seeds=4, folder=tmp_path)
    assert calls == [0, 1]
    told = []
    result = lab.run(counting(calls), seeds=4, folder=tmp_path, progress=lambda *args: told.append(args))
    assert calls == [0, 1, 2, 3]
    assert told[0][:2] == (2, 4)
    assert math.isnan(result.trials[0].values["arm"]["value"])  # through JSON and back
    assert result.trials[1].values["arm"]["value"] == math.inf
    next(tmp_path.rglob("seed-1.json")).write_text("{")  # damaged: done again
    lab.run(counting(calls), seeds=4, folder=tmp_path)
    assert calls == [0, 1, 2, 3, 1]
    lab.run(counting(calls), seeds=1, folder=tmp_path, lr=0.5)  # other settings are not mixed up
    assert calls == [0, 1, 2, 3, 1, 0]


def test_kept_seeds_are_those_of_the_network_and_data_as_they_are(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module, calls = tmp_path / "network_being_edited.py", []
    module.write_text("def make(): ...\n")

    def run(**changes):
        lab.run(counting(calls), seeds=1, folder=tmp_path / "runs", **changes)
        return len(calls)

    spec = "network_being_edited:make"
    assert [run(network=spec), run(network=spec)] == [1, 1]
    module.write_text("def make(): return None\n")
    assert [run(network=spec), run(network=spec)] == [2, 2]
    small, large = (make_data(data(), seed=0) for _ in range(2))
    large.x_train.mul_(2)
    assert [run(data=small), run(data=small), run(data=large), run(data=large)] == [3, 3, 4, 4]
    own, same = (EXPERIMENTS["padding"].config.network, "batchnorm.lab.experiments.padding:SequenceNetwork")
    assert _digest(own) is _digest(same) is None  # built in: of the version alone


def test_workers_find_the_same_bits():
    task = {"network": normalized, "data": data, "steps": 4, "seeds": 2, "batch_size": 20}
    alone, together = lab.figure1(**task), lab.figure1(**task, workers=2)
    for a, b in zip(alone.trials, together.trials, strict=True):
        assert (a.values, a.curves) == (b.values, b.curves)
    with pytest.raises(InputError, match="workers=1"):
        lab.figure1(seeds=2, workers=2, network=lambda num_features: None, data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 3}, "no setting 'stepz'"),
        ({"steps": 0}, "steps=0, expected a whole number, 1 or more"),
        ({"lr": math.nan}, "lr=nan"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"insert": 1}, "insert=1"),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": (1, 1)}, "different seeds"),
        ({"workers": 0}, "workers=0"),
        ({"network": "nowhere"}, "unknown"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        lab.figure1(**{"data": data, **options})


def test_differences_are_paired():
    found = difference([1.0, 2.0, 3.0], [0.0, 2.0, 1.0])
    assert found.mean == pytest.approx(1.0)
    assert found.half_width == pytest.approx(4.30 * 1.0 / math.sqrt(3))
    assert found.kind == "tie"
    assert difference([3.0, 4.1, 5.0], [1.0, 2.0, 3.0]).kind == "more"
    assert difference([1.0], [0.0]).kind == "tie"
    assert difference([math.nan, 1.0, 2.0], [0.0, 3.0, 4.0]).kind == "less"
    assert difference([math.nan], [0.0]).kind == "tie"
    assert difference([0.0, -0.01], [0.0, 0.0]).text(" points").startswith("+0.0 ± 0.1 points")


def test_fit_is_torchs_sgd():
    task = Task("x", Config(network=normalized, data=data, steps=3, batch_size=20, lr=0.2), 0)
    net = task.normalized()
    history = train(net, task)
    again = task.normalized()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.2)
    from batchnorm.training.loop import batch_indices

    for step in range(3):
        at = batch_indices(len(task.data.x_train), 20, 0, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(again(task.data.x_train[at]), task.data.y_train[at]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    again.eval()
    right = (again(task.data.x_test).argmax(1) == task.data.y_test).float().mean()
    assert history.final == pytest.approx(float(right))


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "list"]) == 0
    assert "figure1" in capsys.readouterr().out
    assert main(["lab", "figur1"]) == 2
    assert "Did you mean figure1?" in capsys.readouterr().err
    words = ["lab", "figure1", "--seeds", "1", "--workers", "1", "--data", "digits", "--set", "steps=3", "--quick"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Figure 1 of Ioffe" in out
    page = (tmp_path / "runs" / "lab" / "figure1-quick.html").read_text()
    assert "shortened: the full run has" in page
    assert (tmp_path / "runs" / "lab" / "trials").is_dir()
    assert main(["lab", "figure1", "--set", "lr=-1"]) == 2
    assert "lr=-1" in capsys.readouterr().err


def test_dark_figures_have_the_pages_dark_colours():
    style = (Path(drawing.__file__).parent / "templates" / "colors.css").read_text()
    light, night = style.split("prefers-color-scheme: dark")
    for role, variable in drawing.VARIABLES.items():
        # Text and rules of the light page are its own; all else is the drawing's.
        assert re.search(rf"{variable}: {drawing.DARK[role]}", night), role
        assert role in ("text", "grid") or re.search(rf"{variable}: {drawing.COLORS[role]}", light), role


def test_the_face():
    assert bn.lab.figure1 is EXPERIMENTS["figure1"]
    assert bn.lab.instruments.descent
    with pytest.raises(AttributeError):
        bn.lab.nothing  # noqa: B018


@pytest.mark.parametrize("seeds", [1, 2, 4, 5, 9])
def test_a_verdict_needs_five_seeds(seeds):
    found = settled([Finding("reproduced", "Better."), Finding("note", "By the way.")], seeds)
    assert found[1] == Finding("note", "By the way.")
    if seeds < 5:
        assert found[0].kind == "note"
        assert f"({seeds} seed{'s' * (seeds > 1)}: a verdict needs 5.)" in found[0].text
    else:
        assert found[0] == Finding("reproduced", "Better.")


def wide(num_features, num_classes, width=8):
    layers = [nn.Flatten(), nn.Linear(num_features, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def test_arguments_of_a_factory():
    config = EXPERIMENTS["ghost"].configure(network=wide, data=data, arguments={"width": 5})
    assert Task("ghost", config, 0).normalized()[1].out_features == 5
    assert config.plain()["arguments"] == {"width": 5}
    with pytest.raises(InputError, match="go with a network of yours"):
        EXPERIMENTS["ghost"].configure(arguments={"width": 5})
    with pytest.raises(InputError, match="it has no argument 'depth'"):
        Task("ghost", EXPERIMENTS["ghost"].configure(network=wide, data=data, arguments={"depth": 5}), 0).normalized()
