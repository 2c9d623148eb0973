"""Networks whose own train() returns nothing, or keeps layers in evaluation, go through every verb."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.cli import main

IMAGES = torch.randn(6, 3, 8, 8)


class Block(nn.Module):
    """Convolution, batch normalization and a residual, with a ``train`` that forgets to return the module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


class Frozen(nn.Module):
    """As detectors are written: the first batch normalization stays in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.out = nn.Linear(3, 4)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.first.norm.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x)).mean((2, 3)))


def factory():
    torch.manual_seed(0)
    return Frozen()


@pytest.fixture
def net() -> Frozen:
    made = factory()
    assert made.eval() is None  # as torch has it for such a class
    made.train()
    return made


def test_blocks_are_fused_whose_train_returns_nothing(net):
    original = copy.deepcopy(net)
    bn.accelerate(net, IMAGES)
    assert all(f"{name}.norm: fused with an addition and relu" in str(net.report) for name in ("first", "second"))
    torch.testing.assert_close(net(IMAGES), original(IMAGES))
    bn.revert(net)
    assert type(net.first.norm) is nn.BatchNorm2d


def test_fold_calibrate_and_diagnose(net):
    bn.calibrate(net, [IMAGES])
    diagnosis = bn.diagnose(net, [IMAGES])
    assert {layer.name for layer in diagnosis.layers} == {"first.norm", "second.norm"}
    net.eval()
    folded = bn.fold(net, IMAGES).model
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        torch.testing.assert_close(folded(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)


def test_convert_insert_summary_and_save_memory(net):
    original = copy.deepcopy(net)
    bn.convert(net, IMAGES)
    torch.testing.assert_close(net(IMAGES), original(IMAGES))
    assert bn.save_memory(bn.accelerate(net, IMAGES), IMAGES, budget=1.0).outputs
    assert "second.norm" in str(bn.summary(original, IMAGES))
    plain = nn.Sequential(Block().conv, nn.ReLU(), nn.Flatten(), nn.Linear(192, 2))
    assert isinstance(bn.insert(plain, IMAGES)[1], nn.Module)


def test_freeze_and_adapt(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bn.freeze(net)
        bn.unfreeze(net)
    bn.adapt(net, [IMAGES])
    assert net.training
    assert not net.first.norm.training


@pytest.mark.thorough
def test_a_run_of_the_command_line(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_modes.py").write_text("from test_own_modes import factory\n")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(80, 3, 8, 8)).astype("float32"), y=rng.integers(0, 4, 80))
    arguments = ["train", "--network", "own_modes:factory", "--data", str(tmp_path / "d.npz"), "--steps", "5"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--no-baseline"]) in (0, None)
    assert (tmp_path / "run" / "certificate.json").exists()
