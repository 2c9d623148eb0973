"""calibrate measures exactly, feeds any batch, and leaves no trace but the statistics."""

from __future__ import annotations

import itertools
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from batchnorm import reference as ref
from batchnorm.errors import InputError


def network(dtype=torch.float32):
    """Two dimensions of batch norm, dropout, and an output layer."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, momentum=0.3),
        nn.Sigmoid(),
        nn.Linear(4, 2),
    ).to(dtype)


def drifting(sizes=(8, 2, 5), dtype=torch.float32):
    """Unequal batches with different means and spreads."""
    return [torch.randn(n, 2, 4, 4, dtype=dtype) * (1 + i) + 3 * i for i, n in enumerate(sizes)]


def state_of(net):
    """All of a network that calibrate may touch, to compare before and after."""
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "identities": [id(b) for b in net.buffers()],
        "modes": [m.training for m in net.modules()],
        "momenta": [getattr(m, "momentum", None) for m in net.modules()],
        "hooks": [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in net.modules()],
        "kwargs hooks": [dict(m._forward_pre_hooks_with_kwargs) for m in net.modules()],
    }


def assert_unchanged(net, before):
    after = state_of(net)
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value), name
    del after["state"]
    assert after == before


def inputs_under_batch_statistics(net, batches):
    """The float64 inputs of both layers, batch by batch, each layer normalizing by its batch."""
    first, second = [], []
    for batch in batches:
        conv = net[0].double()(batch.double()).detach()
        first.append(conv.numpy())
        affine = net[1].double()
        y = ref.batch_norm(conv.numpy(), affine.weight.detach().numpy(),
                           affine.bias.detach().numpy(), eps=affine.eps).y  # fmt: skip
        hidden = torch.from_numpy(np.maximum(y, 0)).flatten(1)
        second.append(net[5].double()(hidden).detach().numpy())
    return first, second


def randomize(net):
    """Gamma, beta and statistics away from what they begin with."""
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for value in (m.weight, m.bias, m.running_mean):
                    value.normal_()
                m.running_var.uniform_(0.5, 2)
    return net


class TestStatistics:
    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-11)])
    def test_pooled_is_the_concatenated_inputs(self, dtype, rtol):
        net, batches = randomize(network(dtype)), drifting(dtype=dtype)
        assert bn.calibrate(net, batches) is net
        ours = [(m.running_mean.clone(), m.running_var.clone()) for m in (net[1], net[6])]
        for inputs, (mean, var) in zip(inputs_under_batch_statistics(net, batches), ours, strict=True):
            expected = ref.pooled_statistics(inputs, unbiased=True)
            scale = np.sqrt(expected.var).max()
            np.testing.assert_allclose(mean, expected.mean, rtol=rtol, atol=rtol * scale)
            np.testing.assert_allclose(var, expected.var, rtol=rtol)

    def test_ioffe_is_line_10(self):
        net, batches = randomize(network(torch.float64)), drifting(dtype=torch.float64)
        bn.calibrate(net, batches, method="ioffe")
        for inputs, layer in zip(inputs_under_batch_statistics(net, batches), (net[1], net[6]), strict=True):
            expected = ref.ioffe_statistics(inputs)
            np.testing.assert_allclose(layer.running_mean, expected.mean, rtol=1e-11)
            np.testing.assert_allclose(layer.running_var, expected.var, rtol=1e-11)

    def test_sequential_measures_under_the_final_statistics_before(self):
        net, batches = randomize(network(torch.float64)), drifting(dtype=torch.float64)
        bn.calibrate(net, batches, method="sequential")
        whole = torch.cat(batches)
        first = net[0](whole).detach()
        second = net.eval()[:6](whole).detach()  # in evaluation mode, as at inference
        for inputs, layer in ((first, net[1]), (second, net[6])):
            expected = ref.pooled_statistics([inputs.numpy()], unbiased=True)
            np.testing.assert_allclose(layer.running_mean, expected.mean, rtol=1e-11)
            np.testing.assert_allclose(layer.running_var, expected.var, rtol=1e-11)

    def test_many_batches_of_every_size(self):
        # More than are merged at once; among them batches of one value, and empty ones.
        batches = list(torch.randn(700, 3).mul(3).add(50).split([1, 4, 0, 2, 7] * 50))
        net = nn.Sequential(nn.BatchNorm1d(3), nn.Identity(), bn.BatchNorm1d(3, activation="relu"))
        bn.calibrate(net, batches)
        expected = torch.cat(batches).double()
        np.testing.assert_allclose(net[0].running_mean, expected.mean(0), rtol=1e-6)
        np.testing.assert_allclose(net[0].running_var, expected.var(0), rtol=1e-6)
        assert net[0].num_batches_tracked == net[2].num_batches_tracked == 200
        assert "forward" not in vars(net[0])
        assert "forward" not in vars(net[2])

    def test_a_layer_with_a_forward_of_its_own_keeps_it(self):
        class Shifted(nn.BatchNorm1d):
            def forward(self, x):
                return super().forward(x) + 100

        inherited, patched, batches = Shifted(3), nn.BatchNorm1d(3), torch.randn(12, 3).split(4)
        patched.forward = lambda x: nn.BatchNorm1d.forward(patched, x) + 100
        for layer in (inherited, patched):
            net, own = nn.Sequential(layer, nn.BatchNorm1d(3)), vars(layer).get("forward")
            bn.calibrate(net, batches)
            assert vars(layer).get("forward") is own
            torch.testing.assert_close(net[1].running_mean, torch.full((3,), 100.0))

    @pytest.mark.parametrize("method", ["pooled", "sequential"])
    def test_output_of_one_calibrated_batch_is_the_training_output(self, method):
        # Up to m/(m-1): here m is large enough for that to vanish beside the tolerance.
        net = network(torch.float64)
        net[6] = nn.Identity()
        batch = torch.randn(5000, 2, 4, 4, dtype=torch.float64)
        bn.calibrate(net, [batch], method=method).eval()
        evaluated = net[:2](batch)
        net.train()
        torch.testing.assert_close(net[:2](batch), evaluated, rtol=0, atol=2e-4)

    def test_unequal_batches_on_which_torch_fails(self):
        # Batches of 8 and 2 with means far apart: torch averages the variances inside batches.
        x = torch.cat([torch.randn(8, 1) * 0.1, torch.randn(2, 1) * 0.1 + 10])
        truth, batches = x.double().var(0).item(), [x[:8], x[8:]]
        theirs, ours = nn.Sequential(nn.BatchNorm1d(1)), nn.Sequential(nn.BatchNorm1d(1))
        update_bn(batches, theirs)
        bn.calibrate(ours, batches)
        assert theirs[0].running_var.item() < 0.01 * truth
        assert ours[0].running_var.item() == pytest.approx(truth, rel=1e-6)
        assert ours[0].running_mean.item() == pytest.approx(x.double().mean().item(), rel=1e-6)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
    def test_first_layer_does_not_depend_on_how_the_data_are_cut(self, sizes, seed):
        x = torch.randn(sum(sizes) + 2, 3, generator=torch.Generator().manual_seed(seed)) + 100
        layer = bn.calibrate(nn.BatchNorm1d(3), x.split([*sizes, 2]))
        torch.testing.assert_close(layer.running_mean, x.double().mean(0).float())
        torch.testing.assert_close(layer.running_var, x.double().var(0).float())

    def test_large_mean_small_variance(self):
        x = torch.randn(5000, 1) * 0.92**0.5 + 1e4
        layer = bn.calibrate(nn.BatchNorm1d(1), x.split(64))
        assert layer.running_var.item() == pytest.approx(x.double().var().item(), rel=1e-6)

    def test_former_statistics_do_not_matter(self):
        torch.manual_seed(1)
        net, batches = network(), drifting()
        expected = [b.clone() for b in bn.calibrate(net, batches).buffers()]
        bn.calibrate(randomize_statistics(net), batches)
        for ours, theirs in zip(net.buffers(), expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_dropout_is_off_and_the_random_state_untouched(self):
        net, batches = network(), drifting()
        before = torch.get_rng_state()
        bn.calibrate(net, batches)
        assert torch.equal(torch.get_rng_state(), before)

    def test_batches_of_one_value_per_channel_count(self):
        x = torch.randn(7, 3)
        net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
        nn.init.normal_(net[0].bias)
        bn.calibrate(net, x.split([3, 1, 3]))
        torch.testing.assert_close(net[0].running_mean, x.mean(0))
        torch.testing.assert_close(net[0].running_var, x.var(0))
        # x = mean in the second batch, so the second layer got the first one's bias there.
        normalized = [nn.functional.batch_norm(p, None, None, None, net[0].bias, True)
                      for p in (x[:3], x[4:])]  # fmt: skip
        hidden = net[1](torch.cat([normalized[0], net[0].bias[None], normalized[1]]))
        torch.testing.assert_close(net[2].running_mean, hidden.mean(0))
        torch.testing.assert_close(net[2].running_var, hidden.var(0))

    def test_empty_batches_change_nothing(self):
        x = torch.randn(6, 3)
        layer = bn.calibrate(nn.BatchNorm1d(3), [x[:3], x[:0], x[3:]])
        torch.testing.assert_close(layer.running_var, x.var(0))

    def test_a_layer_used_twice_pools_both_uses(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(2, affine=False).double()

            def forward(self, x):
                return self.norm(3 * self.norm(x) + 5)

        batches = [torch.randn(n, 2, dtype=torch.float64) + n for n in (4, 6)]
        net = bn.calibrate(Twice(), batches)
        second = [3 * ref.batch_norm(b.numpy()).y + 5 for b in batches]
        expected = ref.pooled_statistics([*(b.numpy() for b in batches), *second], unbiased=True)
        np.testing.assert_allclose(net.norm.running_mean, expected.mean)
        np.testing.assert_allclose(net.norm.running_var, expected.var)
        assert net.norm.num_batches_tracked == 4

    @pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)])
    def test_every_kind_of_layer(self, layer):
        space = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}.get(type(layer), 2)
        x = torch.randn(6, 3, *[2] * space)
        bn.calibrate(layer, x.split(3))
        dims = [0, *range(2, x.ndim)]
        torch.testing.assert_close(layer.running_mean, x.mean(dims))
        torch.testing.assert_close(layer.running_var, x.var(dims))

    @pytest.mark.parametrize("activation", [None, "relu"])
    @pytest.mark.parametrize("source", ["auto", "running", "batch"])
    def test_our_layers_whatever_normalizes_them(self, source, activation):
        net = nn.Sequential(bn.BatchNorm1d(3, activation=activation, source=source, update="never"), bn.BatchNorm1d(3))
        theirs = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU() if activation else nn.Identity(), nn.BatchNorm1d(3))
        batches = [torch.randn(n, 3) * n for n in (3, 8, 2)]
        bn.calibrate(net, batches)
        bn.calibrate(theirs, batches)
        for ours, expected in zip(net, (theirs[0], theirs[2]), strict=True):
            torch.testing.assert_close(ours.running_mean, expected.running_mean)
            torch.testing.assert_close(ours.running_var, expected.running_var)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_rounds_once_at_the_end(self, dtype):
        x = (torch.randn(300, 3) * 5).to(dtype)
        layer = bn.calibrate(nn.BatchNorm1d(3).to(dtype), x.split(7))
        assert torch.equal(layer.running_mean, x.double().mean(0).to(dtype))
        assert torch.equal(layer.running_var, x.double().var(0).to(dtype))

    def test_num_batches_tracked_goes_on_with_a_cumulative_average(self):
        layer = nn.BatchNorm1d(2, momentum=None)
        bn.calibrate(layer, torch.randn(12, 2).split(4))
        assert layer.num_batches_tracked == 3
        before, batch = layer.running_mean.clone(), torch.randn(4, 2)
        layer.train()(batch)
        torch.testing.assert_close(layer.running_mean, (3 * before + batch.mean(0)) / 4)


def randomize_statistics(net):
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.fill_(1e6)
            m.running_var.fill_(1e-6)
            m.num_batches_tracked.fill_(77)
    return net


class Named(nn.Module):
    """A network whose forward has names."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, *, scale=1.0):
        return self.norm(x * scale)


class Anything(Named):
    def forward(self, **inputs):
        return self.norm(inputs["x"])


Pair = namedtuple("Pair", "image label")


class TestFeeding:
    x = torch.arange(24.0).reshape(8, 3) ** 2
    y = torch.zeros(8)

    @pytest.mark.parametrize(
        ("net", "wrap"),
        [
            (Named, lambda x, y: x),
            (Named, lambda x, y: (x, y)),
            (Named, lambda x, y: [x, y]),
            (Named, lambda x, y: [x]),
            (Named, Pair),
            (Named, lambda x, y: {"x": x, "labels": y}),
            (Named, lambda x, y: {"x": x / 2, "scale": 2.0, "labels": y}),
            (Named, lambda x, y: UserDict(x=x, labels=y)),
            (Anything, lambda x, y: {"x": x, "labels": y}),
        ],
    )
    def test_any_structure(self, net, wrap):
        batches = [wrap(self.x[:5], self.y[:5]), wrap(self.x[5:], self.y[5:])]
        net = bn.calibrate(net(), iter(batches))
        torch.testing.assert_close(net.norm.running_var, self.x.var(0))

    def test_forward_chooses(self):
        batches = [{"image": [self.x[:5]]}, {"image": [self.x[5:]]}]
        net = bn.calibrate(Named(), batches, forward=lambda net, b: net(b["image"][0], scale=3))
        torch.testing.assert_close(net.norm.running_mean, 3 * self.x.mean(0))

    def test_the_layer_gets_its_input_by_keyword(self):
        class ByKeyword(Named):
            def forward(self, x):
                return self.norm(input=x)

        net = bn.calibrate(ByKeyword(), [self.x])
        torch.testing.assert_close(net.norm.running_mean, self.x.mean(0))

    def test_data_loader_and_single_tensor(self):
        data = torch.utils.data.TensorDataset(self.x, self.y)
        loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
        for batches in (loader, self.x):
            net = bn.calibrate(Named(), batches)
            torch.testing.assert_close(net.norm.running_var, self.x.var(0))

    @pytest.mark.parametrize(("samples", "used"), [(1, 3), (3, 3), (4, 6), (8, 8), (99, 8)])
    def test_samples_stop_at_the_batch_that_reaches_them(self, samples, used):
        batches = [(x, None) for x in self.x.split(3)]
        net = bn.calibrate(Named(), batches, samples=samples)
        torch.testing.assert_close(net.norm.running_mean, self.x[:used].mean(0))

    def test_samples_read_no_batch_too_many(self):
        endless = (self.x for _ in itertools.count())
        assert bn.calibrate(Named(), endless, samples=16).norm.num_batches_tracked == 2

    def test_packed_sequences_reach_the_network(self):
        class Packed(Named):
            def forward(self, packed):
                return self.norm(packed.data)

        packed = nn.utils.rnn.pack_sequence([self.x[:5], self.x[5:]])
        net = bn.calibrate(Packed(), [packed], samples=2)
        torch.testing.assert_close(net.norm.running_mean, self.x.mean(0))

    def test_compiled_networks_are_measured_too(self):
        layer = nn.BatchNorm1d(3)
        net = torch.compile(nn.Sequential(layer), backend="eager").eval()
        with torch.no_grad():  # as calibrate does, so that the compiled code would serve it
            net(self.x[:3])
        bn.calibrate(net, self.x.split(3))
        torch.testing.assert_close(layer.running_var, self.x.var(0))

    @pytest.mark.parametrize("samples", [None, 6])
    def test_progress_bar_counts(self, capsys, samples):
        net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        batches = self.x.split(3)[:2]
        bn.calibrate(net, batches, method="sequential", progress=True, samples=samples)
        out = capsys.readouterr()
        assert ("6/6 samples" if samples else "2/2 batches") in out.err
        assert out.out == ""


class Interrupted(nn.Module):
    """Raises on its third call."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return x


class TestRestoration:
    @pytest.mark.parametrize("method", ["pooled", "ioffe", "sequential"])
    @pytest.mark.parametrize("training", [True, False])
    def test_only_the_statistics_change(self, method, training):
        net = randomize(network()).train(training)
        net[3].train(not training)
        net[1].register_forward_pre_hook(lambda *_: None)
        before = state_of(net)
        bn.calibrate(net, drifting(), method=method)
        for name in [name for name in before["state"] if "running" in name or "num_batch" in name]:
            assert not torch.equal(net.state_dict()[name], before["state"][name])
            before["state"][name] = net.state_dict()[name].clone()
        assert_unchanged(net, before)

    @pytest.mark.parametrize("method", ["pooled", "sequential"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("inside")])
    @pytest.mark.parametrize("where", [0, 4, 9])
    def test_interrupted_anywhere(self, method, error, where):
        net = randomize(network())
        net.insert(where, Interrupted(error))
        net[1].train(False)
        before = state_of(net)
        with pytest.raises(type(error)):
            bn.calibrate(net, drifting(), method=method)
        assert_unchanged(net, before)

    def test_interrupted_while_reading(self):
        def batches():
            yield from drifting((3, 4))
            raise KeyboardInterrupt

        net = randomize(network())
        before = state_of(net)
        with pytest.raises(KeyboardInterrupt):
            bn.calibrate(net, batches())
        assert_unchanged(net, before)

    def test_interrupted_while_writing(self, monkeypatch):
        net = randomize(network())
        before = state_of(net)
        copy, calls, own = torch.Tensor.copy_, [], list(net.buffers())

        def interrupted_once(self, *args):
            if any(self is buffer for buffer in own):
                calls.append(self)
                if len(calls) == 3:
                    raise KeyboardInterrupt
            return copy(self, *args)

        monkeypatch.setattr(torch.Tensor, "copy_", interrupted_once)
        with pytest.raises(KeyboardInterrupt):
            bn.calibrate(net, drifting())
        monkeypatch.undo()
        assert len(calls) > 3
        assert_unchanged(net, before)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_non_finite_values_name_layer_and_batch(self, value):
        net, batches = randomize(network()), drifting()
        batches[1][0, 0, 0, 0] = value
        before = state_of(net)
        with pytest.raises(InputError, match=r"layer '1' .* batch 1 "):
            bn.calibrate(net, batches)
        assert_unchanged(net, before)

    @pytest.mark.parametrize("bad", [3, 70, 129])
    def test_the_first_layer_and_batch_that_are_not_finite(self, bad):
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), bn.BatchNorm1d(3, pool="sequence"), nn.BatchNorm1d(3))
        net.insert(2, nn.Unflatten(0, (2, 2)))
        net.insert(4, nn.Flatten(0, 1))
        batches = list(torch.randn(130, 4, 3))
        batches[bad][0, 0] = torch.inf
        with pytest.raises(InputError, match=rf"layer '1' .* batch {bad} "):
            bn.calibrate(net, batches)

    def test_statistics_that_overflow_the_buffers(self):
        net = nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.BatchNorm1d(2)).half()
        before = state_of(net)
        with pytest.raises(InputError, match="layer '0' overflow"):
            bn.calibrate(net, [torch.tensor([[1.0, 2], [3000, 4]]).half()])
        assert_unchanged(net, before)


class TestLayersWithoutRunningStatistics:
    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
    @pytest.mark.parametrize("method", ["pooled", "sequential"])
    def test_they_get_them_when_asked(self, kind, method):
        net = nn.Sequential(nn.Linear(3, 3), kind(3, track_running_stats=False), nn.Linear(3, 2)).train()
        data = list(torch.randn(40, 3).split(8))
        bn.calibrate(net, data, track_running_stats=True, method=method)
        hidden = net[0](torch.cat(data))
        torch.testing.assert_close(net[1].running_mean, hidden.mean(0))
        torch.testing.assert_close(net[1].running_var, hidden.var(0))
        assert net[1].num_batches_tracked == 5
        before = net[1].running_mean.clone()
        net(data[0])
        assert not torch.equal(net[1].running_mean, before)  # kept in training from now on
        net.eval()(data[0][:1])

    def test_an_attribute_that_was_set_asks(self):
        net = nn.Sequential(bn.BatchNorm1d(3, track_running_stats=False, nonfinite="skip"))
        net[0].track_running_stats = True
        bn.calibrate(net, torch.randn(8, 3))
        assert net[0].running_mean is not None
        assert set(net.state_dict()) == set(nn.Sequential(bn.BatchNorm1d(3, nonfinite="skip")).state_dict())

    def test_an_error_takes_them_away_again(self):
        net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
        with pytest.raises(InputError, match="not finite"):
            bn.calibrate(net, torch.full((8, 3), torch.nan), track_running_stats=True)
        assert net[0].running_mean is None
        assert net[0].track_running_stats is False

    def test_by_choice_they_stay_without(self):
        by_sample = bn.BatchNorm1d(4, ghost_size=1, channel_groups=2, source="batch", track_running_stats=False)
        net = nn.Sequential(by_sample, nn.BatchNorm1d(4))
        net.add_module("unused", nn.BatchNorm1d(4, track_running_stats=False))
        with pytest.warns(UserWarning, match="left alone"):
            bn.calibrate(net, torch.randn(8, 4), forward=lambda net, x: net[1](net[0](x)), track_running_stats=True)
        assert net[0].running_mean is None
        assert net[2].running_mean is None

    def test_half_precision_networks_get_float32(self):
        net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).to(torch.bfloat16)
        bn.calibrate(net, torch.randn(8, 3, dtype=torch.bfloat16), track_running_stats=True)
        assert net[0].running_var.dtype is torch.float32


class TestLayersLeftAlone:
    def test_without_running_statistics(self):
        net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
        with pytest.warns(UserWarning, match=r"\['0'\] keep no running statistics"):
            bn.calibrate(net, torch.randn(8, 3).split(4))
        assert net[0].running_mean is None
        assert net[1].num_batches_tracked == 2

    @pytest.mark.parametrize("method", ["pooled", "sequential"])
    def test_not_reached(self, method):
        net = Named()
        net.unused = nn.BatchNorm1d(3)
        with pytest.warns(UserWarning, match=r"\['unused'\] were not reached"):
            bn.calibrate(net, [torch.randn(8, 3)], method=method)
        assert net.unused.running_mean.tolist() == [0, 0, 0]
        assert net.norm.num_batches_tracked == 1

    def test_instance_norm_is_no_batch_norm(self):
        net = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
        bn.calibrate(net, [torch.randn(8, 3, 5)])
        assert net[1].running_mean.tolist() == [0, 0, 0]


class TestErrors:
    @pytest.mark.parametrize(
        ("net", "batches", "options", "message"),
        [
            (nn.Linear(3, 3), [torch.ones(2, 3)], {}, "Linear has no batch-norm layer"),
            (Named(), [], {}, "no batches"),
            (Named(), {"x": torch.ones(2, 3)}, {}, "one dict"),
            (Named(), [torch.randn(2, 3)], {"method": "exact"}, "method='exact'"),
            (Named(), [torch.randn(2, 3)], {"samples": 0}, "samples=0"),
            (Named(), [{"image": torch.ones(2, 3)}], {}, r"keys \['image'\]"),
            (Named(), [()], {}, "empty tuple"),
            (Named(), [torch.ones(1, 3)], {}, r"layer 'norm' got 1 value\(s\) per channel"),
            (Named(), [torch.ones(1, 3)] * 3, {"method": "ioffe"}, "larger batches"),
            (Named(), [torch.ones(0, 3)], {}, r"layer 'norm' got 0 value\(s\)"),
            (nn.BatchNorm1d(3, track_running_stats=False), [torch.ones(2, 3)], {}, "nothing to"),
            (nn.LazyBatchNorm1d(), [torch.ones(2, 3)], {}, "not initialized"),
            (lambda x: x, [torch.ones(2, 3)], {}, "got a function"),
        ],
    )
    def test_one_clear_error(self, net, batches, options, message):
        with pytest.raises(InputError, match=message):
            bn.calibrate(net, batches, **options)

    def test_no_layer_reached(self):
        net = nn.ModuleDict({"norm": nn.BatchNorm1d(3)})
        with pytest.raises(InputError, match="reached no batch-norm layer"):
            bn.calibrate(net, [torch.ones(2, 3)], forward=lambda net, batch: None)

    def test_samples_need_something_to_count(self):
        with pytest.raises(InputError, match="to count its samples"):
            bn.calibrate(Named(), [object()], samples=3, forward=lambda net, _: net(torch.randn(4, 3)))

    def test_sequential_needs_to_read_again(self):
        net = network()
        before = state_of(net)
        with pytest.raises(InputError, match="one-shot generator"):
            bn.calibrate(net, (b for b in drifting()), method="sequential")
        assert_unchanged(net, before)
        bn.calibrate(nn.BatchNorm1d(3), iter([torch.randn(4, 3)]), method="sequential")

    def test_errors_of_the_network_pass_through(self):
        with pytest.raises(RuntimeError, match="mat1"):
            bn.calibrate(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), [torch.ones(2, 4)])


class Split(nn.BatchNorm2d):
    """Statistics of two halves of a batch, as self-supervised learning on one device takes them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("running_mean", torch.zeros(2 * channels))
        self.register_buffer("running_var", torch.ones(2 * channels))


def test_layers_that_keep_more_statistics_than_channels_are_refused_by_name():
    net = nn.Sequential(nn.BatchNorm2d(3), Split(3))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(InputError, match=r"layer '1' is a Split, which keeps 6 running means for 3 channels"):
        bn.calibrate(net, [torch.randn(4, 3, 2, 2)])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
