"""Own networks with several inputs, or outputs in tuples, dicts, data classes: a result, or one line of what to do."""

from __future__ import annotations

import json
import sys

import pytest
from machines import contents

from batchnorm.cli import main

KINDS = """
import collections, dataclasses
import torch
from torch import nn

Named = collections.namedtuple("Named", "logits hidden")

@dataclasses.dataclass
class Fields:
    logits: torch.Tensor
    hidden: torch.Tensor

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 10)
    def forward(self, x):
        hidden = self.body(x)
        y = self.head(hidden)
        if self.kind == "fails in training" and self.training:
            raise RuntimeError("broken\\nhere")
        return {"tensor": lambda: y, "fails in training": lambda: y, "nothing": lambda: None,
                "tuple": lambda: (y,), "deep": lambda: (None, [{"a": y}, 3]), "dict": lambda: {"logits": y},
                "named": lambda: Named(y, hidden), "fields": lambda: Fields(y, hidden)}[self.kind]()

class Two(Net):
    def forward(self, x, mask): return super().forward(x * mask)
class Keyword(Net):
    def forward(self, *, x): return super().forward(x)
class Entry(Net):
    def forward(self, batch): return super().forward(batch["x"])
class Ids(Net):
    def __init__(self):
        super().__init__("tensor")
        self.embedding = nn.Embedding(3, 1)
    def forward(self, x): return super().forward(self.embedding(x).squeeze(-1))
class Optional(Net):
    def forward(self, x, mask=None, **more): return super().forward(x)

def of(kind): return Net(kind)
def two(): return Two("tensor")
def keyword(): return Keyword("tensor")
def entry(): return Entry("tensor")
def ids(): return Ids()
def optional(): return Optional("tensor")
"""
DATA, SHAPE = ["--data", "digits"], ["--shape", "2,1,8,8"]
COMMANDS = {
    "summary": [*SHAPE, "--json"],
    "diagnose": [*DATA, "--batches", "2", "--json"],
    "calibrate": [*DATA, "--out", "new/w.safetensors"],
    "adapt": [*DATA, "--out", "new/w.safetensors"],
    "fold": [*SHAPE, "--out", "new/w.safetensors"],
    "convert": [*SHAPE, "--to", "batchnorm", "--out", "new/w.safetensors"],
    "train": [*DATA, "--steps", "2", "--out", "new/run"],
    "lab explain": [*DATA, "--set", "steps=2", "--out", "new/lab"],
    "lab play": [*DATA, "--set", "steps=2", "--out", "new/lab"],
    "lab figure1": [*DATA, "--set", "steps=2", "--seeds", "1", "--workers", "1", "--out", "new/lab"],
}
NEED_LOGITS = ("train", "lab explain", "lab play", "lab figure1")


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    """The current folder, with the module of networks, and a folder for results."""
    (tmp_path / "kinds.py").write_text(KINDS)
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("kinds", None)
    yield tmp_path
    sys.modules.pop("kinds", None)


def command_line(command, factory, kind=None):
    chosen = [] if kind is None else ["--set", f"kind={kind}"]
    return [*command.split(), *COMMANDS[command], "--network", f"kinds:{factory}", *chosen]


def refusal(arguments, folder, capsys):
    """The one line of a command that ends with code 2 and leaves nothing behind."""
    capsys.readouterr()
    before = contents(folder)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("batchnorm: error: ")]
    assert contents(folder) == before
    return line


@pytest.mark.parametrize("kind", ["tuple", "deep", "dict", "named", "fields"])
@pytest.mark.parametrize("command", ["calibrate", "adapt", "fold", "convert"])
def test_weights_are_those_of_the_plain_network(kinds, command, kind):
    written = kinds / "new" / "w.safetensors"
    found = []
    for each in ("tensor", kind):
        arguments = command_line(command, "of")
        if command == "convert":  # whose --set is for layers
            (kinds / "kinds.py").write_text(f"{KINDS}\ndef only(): return Net({each!r})\n")
            sys.modules.pop("kinds", None)
            arguments = command_line(command, "only")
        else:
            arguments = command_line(command, "of", each)
        assert main(arguments) == 0
        found.append(written.read_bytes())
        written.unlink()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["tuple", "deep", "dict", "named", "fields"])
def test_tables_are_those_of_the_plain_network(kinds, capsys, kind):
    for command in ("summary", "diagnose"):
        found = []
        for each in ("tensor", kind):
            assert main(command_line(command, "of", each)) == 0
            shown = capsys.readouterr()
            found.append(json.loads(shown.out))
            left_out = "Loss and accuracy are left out: the network returns an object of type" in shown.err
            assert left_out == (command == "diagnose" and each != "tensor")
        plain, other = (made["layers"] for made in found)
        for row in (*plain, *other):
            row.pop("effect", None)  # on more outputs than one
        assert plain == other
        if command == "diagnose" and kind in ("tuple", "deep", "dict"):
            mode = "evaluation"
            assert found[0]["outcomes"][mode]["distance"] == found[1]["outcomes"][mode]["distance"] > 0


def test_nothing_to_compare_is_said(kinds, capsys):
    assert main([*command_line("diagnose", "of", "nothing"), "--html", "new/page.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"].startswith("Outputs cannot be compared")
    assert found["outcomes"]["evaluation"]["distance"] is None
    assert found["layers"][0]["effect"] is None
    assert found["layers"][0]["mean_off"] > 0
    assert "of their standard deviation" not in (kinds / "new" / "page.html").read_text()


@pytest.mark.parametrize("command", NEED_LOGITS)
@pytest.mark.parametrize("kind", ["tuple", "dict", "fields", "nothing"])
def test_training_needs_logits_alone(kinds, capsys, command, kind):
    line = refusal(command_line(command, "of", kind), kinds, capsys)
    assert "network kinds:of: for a batch of shape" in line
    assert "expected logits of shape" in line
    assert line.endswith("Let the factory return a module that gives them alone.")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("factory", ["two", "keyword", "entry", "ids"])
def test_other_inputs_are_refused(kinds, capsys, command, factory):
    line = refusal(command_line(command, factory), kinds, capsys)
    assert f"kinds:{factory}" in line
    assert "A network gets one tensor, the samples of a batch" in line
    assert line.endswith("return a module whose forward makes it of that tensor.")


@pytest.mark.parametrize("command", ["calibrate", "fold"])
def test_optional_inputs_keep_their_defaults(kinds, command):
    assert main(command_line(command, "optional")) == 0


@pytest.mark.parametrize("command", ["diagnose", "train"])
def test_a_network_that_fails_later(kinds, capsys, command):
    assert main(command_line(command, "of", "fails in training")) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("batchnorm: error: ")]
    assert "RuntimeError: broken here" in line


@pytest.mark.parametrize(("kind", "suffix"), [("named", ".pt2"), ("fields", ".pt2"), ("fields", ".onnx")])
def test_archives_of_own_classes(kinds, capsys, kind, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    out = f"new/net{suffix}"
    line = refusal(["fold", "--network", "kinds:of", "--set", f"kind={kind}", *SHAPE, "--out", out], kinds, capsys)
    assert f"Its output is of the class {kind.title()}, which archives cannot hold: return a tuple or a dict." in line
    assert line.endswith("A .safetensors file takes its weights alone.")
