"""The life of a recurrent network: calibrate, freeze, fold, summary and modes on what normalizes inside its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, SurgeryError
from batchnorm.moments import Moments
from batchnorm.training.networks import lstm

LENGTHS = torch.tensor([5, 3, 6, 6, 2, 4])


class Tagger(nn.Module):
    """A network as users write them: a recurrent layer in both directions, whose output all goes on."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(bn, kind)(3, 4, num_layers=2, bidirectional=True, **options)
        self.out = nn.Linear(8, 2)

    def forward(self, x, lengths=None):
        return self.out(self.layer(x, lengths=lengths)[0])


def trained(net):
    """Statistics, gamma and beta that are not those of the start."""
    for name, parameter in net.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.4, 1.2)
    for _ in range(3):
        net(torch.randn(6, 6, 3, dtype=next(net.parameters()).dtype) + 0.5)
    return net


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_fold(kind):
    x = torch.randn(6, 6, 3)
    for recurrent in (False, True):
        net = trained(Tagger(kind, batch_norm="sequence", recurrent=recurrent)).eval()
        result = bn.fold(net, x)
        ends = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
        assert [f.into for f in result.certificate.folded] == [f"layer.weight_ih{end}" for end in ends]
        assert all("time steps" in kept.reason for kept in result.certificate.kept)
        assert len(result.certificate.kept) == recurrent * 4 * (2 if kind == "LSTM" else 1)
        torch.testing.assert_close(result.model(x), net(x), rtol=1e-5, atol=1e-5)
        if not recurrent:
            plain = getattr(nn, kind)(3, 4, num_layers=2, bidirectional=True)
            plain.load_state_dict(result.model.layer.state_dict())
            torch.testing.assert_close(net.out(plain(x)[0]), net(x), rtol=1e-5, atol=1e-5)
        again = copy.deepcopy(result.model)
        again.load_state_dict(result.model.state_dict())
    frames = trained(Tagger(kind, batch_norm="frame")).eval()
    certificate = bn.fold(frames, x).certificate
    assert not certificate.folded
    assert all("another map at each step" in kept.reason for kept in certificate.kept)
    net.layer.norm_ih_l0.register_forward_hook(lambda *_: None)
    assert all("hooks" in kept.reason for kept in bn.fold(net, x).certificate.kept)
    with pytest.raises(SurgeryError, match="training mode"):
        bn.fold(frames.train(), x)


def test_calibrate_measures_each_step():
    batches = [torch.randn(6, 6, 3, dtype=torch.float64) * s for s in (1, 2)]
    net = Tagger("LSTM", batch_norm="frame", recurrent=True, max_steps=8).double()
    loader = [{"x": x, "lengths": LENGTHS} for x in batches]
    bn.calibrate(net, loader)
    norm, weight = net.layer.norm_ih_l0, net.layer.weight_ih_l0
    for t in range(6):
        rows = [x[t][t < LENGTHS] @ weight.t() for x in batches]
        expected = Moments.merge_all([Moments.of(r.detach()) for r in rows])
        torch.testing.assert_close(norm.running_mean[t], expected.mean)
        torch.testing.assert_close(norm.running_var[t], expected.variance(unbiased=True))
    assert norm.num_batches_tracked.tolist() == [2] * 6 + [0] * 2
    assert torch.equal(norm.running_var[6:], torch.ones_like(norm.running_var[6:]))
    # What W_hh h is at a step depends on the statistics of the steps before: those of the batch, as in training.
    seen = []
    net.eval()
    with bn.mode(net, source="batch"):
        for norm in (net.layer.norm_hh_l0, net.layer.norm_c_l0):
            calls = []
            hook = norm.register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args[0].detach()))
            for batch in loader:
                net(**batch)
            hook.remove()
            seen.append((norm, [torch.cat(calls[t::6]) for t in range(6)]))
    for norm, steps in seen:
        for t, values in enumerate(steps):
            torch.testing.assert_close(norm.running_mean[t], values.mean(0))
            torch.testing.assert_close(norm.running_var[t], values.var(0))
    for method in ("ioffe", "sequential"):
        bn.calibrate(net, loader, method=method)
        assert all(bool(torch.isfinite(buffer).all()) for buffer in net.buffers())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="not finite"):
        bn.calibrate(net, [loader[0], {"x": batches[0] * torch.nan}])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {m.source for m in net.modules() if hasattr(m, "source")} == {"auto"}


def test_freeze_holds_and_comes_off():
    net = trained(Tagger("GRU", batch_norm="frame", recurrent=True))
    before, x = copy.deepcopy(net.state_dict()), torch.randn(6, 6, 3)
    expected = copy.deepcopy(net).eval()(x)
    bn.freeze(net)
    torch.testing.assert_close(net.train()(x), expected, rtol=0, atol=0)
    net(x).sum().backward()
    assert all((p.grad is None) == ("norm" in name) for name, p in net.named_parameters())
    again = Tagger("GRU", batch_norm="frame", recurrent=True)
    again.load_state_dict(net.state_dict())  # which says that it is frozen
    torch.testing.assert_close(again.train()(x), expected, rtol=0, atol=0)
    bn.unfreeze(net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.allclose(net(x), expected)
    with bn.no_update(net):
        before = copy.deepcopy(net.state_dict())
        net(x)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_summary_lists_what_is_inside():
    net = trained(Tagger("LSTM", batch_norm="frame", recurrent=True, max_steps=8))
    rows = bn.summary(net, torch.randn(6, 6, 3)).layers
    assert len(rows) == 12
    first = next(row for row in rows if row.name == "layer.norm_c_l0")
    assert (first.type, first.features, first.trained, first.not_trained) == ("StepBatchNorm", 4, 8, 2 * 8 * 4)
    assert {row.health for row in rows} == {"good"}  # that W_hh h is constant at the first step is no fault
    fresh = bn.summary(Tagger("LSTM", batch_norm="frame")).layers
    assert {row.health for row in fresh} == {"untrained"}


def test_verbs_that_refuse_statistics_by_step():
    net = Tagger("LSTM", batch_norm="frame")
    with pytest.raises(InputError, match="has pool="):
        bn.accumulate_exact(net, [torch.randn(6, 6, 3)] * 2, lambda net, x: net(x).sum())
    x = torch.randn(6, 6, 3)
    bn.adapt(trained(net).eval(), [x], prior=6)
    bn.restore(net)
    with pytest.raises(SurgeryError, match="layers lack"):
        bn.convert(net, to="torch")
    bn.convert(net, process_group="world", nonfinite="skip_channel")
    norm = net.layer.norm_ih_l1_reverse
    assert (norm.process_group, norm.label) == ("world", "layer.norm_ih_l1_reverse")
    assert norm.num_batches_skipped.shape == (100, norm.num_features)
    bn.revert(net)
    assert (norm.process_group, norm.nonfinite, type(norm).__name__) == (None, "propagate", "StepBatchNorm")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((InputError, SurgeryError)):
        bn.convert(net, activation="relu")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_classifier_masks_what_is_padding():
    torch.manual_seed(0)
    net = lstm((6, 3), 4).with_batch_norm(batch_norm="sequence")
    x = torch.randn(6, 6, 3)
    for row, length in zip(x, LENGTHS, strict=True):
        row[length:] = 0
    net(x)
    wide = torch.cat([x, torch.zeros(6, 5, 3)], 1)
    other = copy.deepcopy(net)
    torch.testing.assert_close(net(x), other(wide))
    torch.testing.assert_close(net.recurrent.norm_ih_l0.running_var, other.recurrent.norm_ih_l0.running_var)
    other.counts_padding = True
    assert not torch.allclose(other(x), net(x))
    plain = lstm((6, 3), 4).eval()
    torch.testing.assert_close(plain(x), plain(wide))
