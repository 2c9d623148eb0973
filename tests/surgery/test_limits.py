"""How far an edited network may be from the original: one rule for all verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.rounding import accepted, trembling


def far_from_zero() -> nn.Sequential:
    """Features of 2e5 +- 5: their normalization in float32 is uncertain by some 1e-3 of the outputs' values."""
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    net[0].running_mean.fill_(2e5)
    net[0].running_var.fill_(25.0)
    return net


@pytest.mark.parametrize(("own", "limit"), [(None, 1e-5), (1e-7, 1e-5), (1e-3, 4e-3), (0.3, 1.2), (2.0, 1e-5)])
def test_four_times_the_own_rounding_is_accepted_unless_it_tells_nothing(own: float | None, limit: float):
    assert accepted(1e-5, own) == pytest.approx(limit)


def test_trembling_changes_the_last_bits_of_what_layers_give():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.BatchNorm1d(4, affine=False)).train(), torch.randn(32, 4)
    before = net(x)
    after = trembling(net, 0)(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=5e-7, atol=1e-6)
    assert torch.equal(net(x), before)  # the network itself is as it was


@torch.no_grad()
def test_no_refusal_for_rounding(tmp_path: Path):
    """`convert` and `convert_archive` on a network whose own float32 is uncertain."""
    from batchnorm.surgery.archives import quiet
    from batchnorm.surgery.files import convert_archive, save_archive

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * 5 + 2e5
    net = far_from_zero()
    path = tmp_path / "net.pt2"
    with quiet():
        save_archive(torch.export.export(net, (x,)), path)
    exact = far_from_zero().double()
    exact.load_state_dict(net.state_dict())
    truth = exact(x.double())
    error = float((net(x) - truth).abs().max() / truth.abs().max())
    assert error > 1e-4  # as torch computes it
    program = convert_archive(path)
    with quiet():
        ours = program.module()(x)
    converted = bn.convert(net, x)(x)
    for y in (ours, converted):
        assert float((y - truth).abs().max() / truth.abs().max()) <= 4 * error
