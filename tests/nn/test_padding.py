"""Lengths that normalizations inside someone else's forward are told from outside."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

LENGTHS = torch.tensor([9, 4])


class Encoder(nn.Module):
    """A network that has lengths and hands its normalization x alone."""

    def __init__(self, norm, stride=1, rank=1):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
        kernel = 1 if stride == 1 else (3, *[1] * (rank - 1))[::-1]
        padding = 0 if stride == 1 else (1, *[0] * (rank - 1))[::-1]
        strides = (stride, *[1] * (rank - 1))[::-1]
        self.net = nn.Sequential(conv(8, 8, kernel, strides, padding), norm, nn.SiLU())

    def forward(self, x, lengths=None):
        return self.net(x)


def valid_of(net, x, lengths):
    """All valid frames behind the first convolution, (C, frames)."""
    y = net.net[0](x).detach()
    return torch.cat([y[i, ..., :n].flatten(1) for i, n in enumerate(lengths)], 1)


NORMS = {
    "ours": lambda: bn.BatchNorm1d(8),
    "torch's": lambda: nn.BatchNorm1d(8),
    "sync": lambda: nn.SyncBatchNorm(8),
    "biased, skip": lambda: bn.BatchNorm1d(8, running_var="biased", nonfinite="skip"),
}


@pytest.mark.parametrize("extra", [0, 500])
@pytest.mark.parametrize("norm", NORMS.values(), ids=list(NORMS))
def test_statistics_are_those_of_the_valid_frames(norm, extra):
    net, x = Encoder(norm()), torch.randn(2, 8, 9 + extra) + 2
    kind = type(net.net[1])
    with bn.mask_padding(net, LENGTHS):
        y = net(x, LENGTHS)
    valid = valid_of(net, x, LENGTHS)
    torch.testing.assert_close(net.net[1].running_mean, 0.1 * valid.mean(1), rtol=1e-5, atol=1e-6)
    assert not y[1, :, 4:].any()
    assert type(net.net[1]) is kind
    assert "_padding" not in net.net[1].__dict__


def test_padding_changes_no_bit():
    net, x = Encoder(bn.BatchNorm1d(8)), torch.randint(-9, 10, (2, 8, 9)).float()
    with torch.no_grad():  # whole numbers: a convolution may take its sums in another order for another length
        for p in net.net[0].parameters():
            p.copy_(torch.randint(-9, 10, p.shape))
    longer, twin = torch.cat([x, torch.full((2, 8, 500), torch.nan)], 2), copy.deepcopy(net)
    longer[1, :, 4:] = torch.nan
    with bn.mask_padding(net, LENGTHS), bn.mask_padding(twin, LENGTHS):
        y, z = net(x), twin(longer)
    assert torch.equal(y, z[..., :9])
    assert torch.equal(net.net[1].running_var, twin.net[1].running_var)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("size", [9, 10, 50])
def test_lengths_follow_strides(rank, size):
    net = Encoder((bn.BatchNorm1d, bn.BatchNorm2d)[rank - 1](8), stride=2, rank=rank)
    x = torch.randn(2, 8, *[3] * (rank - 1), size)
    with bn.mask_padding(net, LENGTHS):
        y = net(x)
    frames = y.shape[-1]
    scaled = [-(-n * frames // size) for n in (9, 4)]
    valid = valid_of(net, x, scaled)
    torch.testing.assert_close(net.net[1].running_mean, 0.1 * valid.mean(1), rtol=1e-5, atol=1e-6)
    assert not y[1, ..., scaled[1] :].any()
    assert y[1, ..., scaled[1] - 1].all()


def test_time_may_be_the_first_axis_of_space():
    layer, x = bn.BatchNorm2d(3), torch.randn(2, 3, 9, 5)
    with bn.mask_padding(layer, LENGTHS, time_axis=0):
        y = layer(x)
    twin = bn.BatchNorm2d(3)
    expected = twin(x, mask=(torch.arange(9) < LENGTHS[:, None])[:, :, None])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_over_sequences_know_their_time_axis(batch_first):
    layer = bn.BatchNorm1d(3, pool="sequence", batch_first=batch_first)
    twin, x = copy.deepcopy(layer), torch.randn(2, 12, 3)
    x = x if batch_first else x.transpose(0, 1)
    with bn.mask_padding(layer, LENGTHS):
        y = layer(x)
    assert torch.equal(y, twin(x, lengths=LENGTHS))


def test_a_mask_with_holes_is_sampled():
    net, mask = Encoder(bn.BatchNorm1d(8), stride=2), torch.rand(2, 10) < 0.6
    x = torch.randn(2, 8, 10)
    with bn.mask_padding(net, mask=mask):
        net(x)
    y = net.net[0](x).detach().transpose(0, 1)[:, mask[:, ::2]]
    torch.testing.assert_close(net.net[1].running_mean, 0.1 * y.mean(1), rtol=1e-5, atol=1e-6)


def test_a_rule_gives_the_lengths_behind_a_module_and_of_a_layer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.front = nn.Conv1d(3, 3, 3, stride=2)  # without padding
            self.first, self.second = bn.BatchNorm1d(3), bn.BatchNorm1d(3)

        def forward(self, x):
            x = self.front(x)
            self.seen = x.detach()
            return self.second(self.first(x))

    net, x = Two(), torch.randn(2, 3, 21)
    for rules in ({"front": lambda n: (n - 3) // 2 + 1}, {net.first: lambda n: (n - 3) // 2 + 1}):
        net.first.reset_running_stats()
        with bn.mask_padding(net, torch.tensor([21, 8]), rules=rules):
            y = net(x)
        valid = torch.cat([net.seen[0], net.seen[1, :, :3]], 1)  # (8 - 3) // 2 + 1; the ratio would give 4
        torch.testing.assert_close(net.first.running_mean, 0.1 * valid.mean(1), rtol=1e-5, atol=1e-6)
        assert not y[1, :, 3:].any()
        assert y[1, :, 2].all()


@pytest.mark.parametrize("kind", [bn.LSTM, bn.GRU, bn.RNN])
def test_recurrences_read_the_lengths(kind):
    layer = kind(3, 4, batch_norm="sequence", batch_first=True)
    twin, x = copy.deepcopy(layer), torch.randn(2, 12, 3)
    with bn.mask_padding(nn.ModuleDict({"rnn": layer}), LENGTHS):
        y, _ = layer(x)
    expected, _ = twin(x, lengths=LENGTHS)
    assert torch.equal(y, expected)
    assert torch.equal(layer.norm_ih_l0.running_mean, twin.norm_ih_l0.running_mean)


def test_subclasses_keep_their_forward_or_are_named():
    class Act(nn.BatchNorm1d):
        def forward(self, x):
            return torch.relu(super().forward(x))

    net, x = Encoder(Act(8)), torch.randn(2, 8, 9)
    with bn.mask_padding(net, LENGTHS):
        y = net(x)
    valid = valid_of(net, x, LENGTHS)
    torch.testing.assert_close(net.net[1].running_mean, 0.1 * valid.mean(1), rtol=1e-5, atol=1e-6)
    assert bool((y >= -0.3).all())
    assert type(net.net[1]) is Act

    class Moving(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + float(self.training)

    with pytest.raises(bn.errors.InputError, match=r"net\.1"), bn.mask_padding(Encoder(Moving(8)), LENGTHS):
        pass
    cell = nn.Sequential(bn.LSTMCell(3, 4, batch_norm="sequence"))
    with pytest.raises(bn.errors.InputError, match="LSTMCell"), bn.mask_padding(cell, LENGTHS):
        pass


def test_what_a_network_hands_on_itself_comes_first():
    layer, x = bn.BatchNorm1d(3), torch.randn(2, 3, 9)
    with bn.mask_padding(layer, LENGTHS):
        y = layer(x, lengths=torch.tensor([2, 2]))
    assert not y[0, :, 2:].any()


class Checkpointed(nn.Module):
    """A part of whose forward runs again in the backward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner.net[1], self.inner.net[0](x), use_reentrant=False)


def test_gradients_are_those_of_the_mask_also_under_checkpoints():
    net, x = Encoder(bn.BatchNorm1d(8), stride=2), torch.randn(2, 8, 20)
    twin, outer = copy.deepcopy(net), Checkpointed(net)
    with bn.mask_padding(outer, LENGTHS):
        outer(x).square().sum().backward()
    mask = (torch.arange(20) < LENGTHS[:, None])[:, ::2]
    twin.net[1](twin.net[0](x), mask=mask).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert torch.equal(net.net[1].running_mean, twin.net[1].running_mean)


def test_sizes_that_leave_time_open_are_told():
    net = nn.Sequential(nn.Conv1d(10, 8, 3, stride=2), bn.BatchNorm1d(8))
    x = torch.randn(2, 10, 12)
    with pytest.raises(bn.errors.InputError, match=r"which axis .* time.* size="), bn.mask_padding(net, LENGTHS):
        net(x)
    with bn.mask_padding(net, LENGTHS, size=12):
        net(x)
    with pytest.raises(bn.errors.InputError, match="3 samples"), bn.mask_padding(net, LENGTHS):
        net(torch.randn(3, 10, 30))
    for wrong in ({"lengths": LENGTHS, "mask": torch.ones(2, 3) > 0}, {}, {"lengths": LENGTHS.float()}):
        with pytest.raises(bn.errors.InputError), bn.mask_padding(net, **wrong):
            pass
    with pytest.raises(bn.errors.InputError, match="no module"), bn.mask_padding(net, LENGTHS, rules={"x": len}):
        pass


def test_contexts_nest_and_errors_leave_nothing():
    net = Encoder(bn.BatchNorm1d(8))
    x = torch.randn(2, 8, 9)
    with pytest.raises(RuntimeError, match="channels"), bn.mask_padding(net, LENGTHS):
        net(torch.randn(2, 5, 9))
    with bn.mask_padding(net, LENGTHS):
        with bn.mask_padding(net, torch.tensor([1, 2])):
            inner = net(x)
        outer = net(x)
    assert not inner[0, :, 1:].any()
    assert not outer[1, :, 4:].any()
    assert outer[0].all()
    assert net(x)[1].all()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_calibrate_diagnose_and_adapt_take_batches_with_lengths():
    torch.manual_seed(0)
    batches = [(torch.randn(4, 8, 30) + 3, torch.tensor([30, 12, 3, 20])) for _ in range(4)]
    frames = torch.cat([x[i, :, :n] for x, lengths in batches for i, n in enumerate(lengths)], 1)
    for norm in (bn.BatchNorm1d(8), nn.BatchNorm1d(8)):
        net = nn.Sequential(norm, nn.Conv1d(8, 2, 1))
        bn.calibrate(net, batches, lengths=1)
        torch.testing.assert_close(net[0].running_mean, frames.mean(1))
        torch.testing.assert_close(net[0].running_var, frames.var(1))
        found = bn.diagnose(net, batches, lengths=lambda batch: batch[1])
        assert found.layers[0].mean_off < 1e-5
        assert found.layers[0].cause is None

        def padded(net, batch):
            with bn.mask_padding(net, batch["n"]):
                return net(batch["input"])

        named = [{"input": x, "n": n} for x, n in batches]
        net[0].reset_running_stats()
        bn.adapt(net, named, prior=0, forward=padded)
        torch.testing.assert_close(net[0].running_mean, frames.mean(1))
        net[0].reset_running_stats()
        bn.restore(net)
        bn.adapt(net, named, prior=0, lengths="n")
        torch.testing.assert_close(net[0].running_mean, frames.mean(1))
    with pytest.raises(bn.errors.InputError, match="nothing there"):
        bn.calibrate(net, [batches[0][0]], lengths="n")
