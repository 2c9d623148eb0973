"""Inputs of kinds that people reported against batch normalization, each with its right value.

The kinds behind them have tests of their own beside the code; ghost batches across ranks are in
tests/nn/test_synchronized.py, since they need two processes.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import BatchNormError, InputError


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4), nn.ReLU())


def folded() -> tuple[Any, torch.Tensor]:
    """A network of which `fold` leaves scale and shift, and an input."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), bn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 7, 7)
    return bn.fold(net, x).model, x


# Recorders


def test_recording_counts_no_batch():
    net = conv_net()
    torch.fx.symbolic_trace(net)
    assert int(net[1].num_batches_tracked) == 0


def test_a_recording_evaluates_as_the_network():
    net = conv_net()
    twin, traced, x = copy.deepcopy(net), torch.fx.symbolic_trace(net), torch.randn(4, 3, 7, 7)
    torch.testing.assert_close(traced.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-5)


def test_recorders_take_ghost_batches_recurrences_and_what_folding_leaves():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = bn.LSTM(3, 4, batch_norm="sequence", batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.rnn(x)[0]

    for net in (nn.Sequential(bn.BatchNorm1d(4, ghost_size=2)), Net(), folded()[0]):
        traced = torch.fx.symbolic_trace(net)
        assert any(node.op == "call_module" for node in traced.graph.nodes)


def test_a_trace_never_takes_a_batch_of_one_value_in_silence():
    layer = bn.BatchNorm1d(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes that become constants
        traced = torch.jit.trace(layer, torch.randn(4, 3), check_trace=False)
    with pytest.raises(Exception, match="more than 1 value"):
        traced(torch.randn(1, 3))
    assert layer.running_var.isfinite().all()
    with pytest.raises(BatchNormError, match="convert"):
        torch.jit.script(bn.BatchNorm2d(3).eval())


def test_encoder_layers_of_torch_call_their_normalization():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.norm1, layer.norm2 = (bn.BatchNorm1d(8, pool="sequence") for _ in range(2))
    x = torch.randn(3, 7, 8) + 2
    layer(x), layer.eval()
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


# Moving averages


def test_statistics_of_16_bits():
    layer = bn.BatchNorm1d(1, affine=False).to(torch.bfloat16)
    x = torch.tensor([[99.5], [100.5]] * 32, dtype=torch.bfloat16)
    for _ in range(300):
        layer(x)
    assert abs(float(layer.eval()(x[:1])) + 1) < 0.1
    slow = bn.BatchNorm1d(1, affine=False, momentum=0.001).to(torch.bfloat16)
    for _ in range(8000):
        slow((x - 99).to(torch.bfloat16))
    assert abs(float(slow.running_var) - 0.254) < 0.02


def test_a_variance_beyond_half_precision():
    layer = bn.BatchNorm1d(2).half()
    for _ in range(100):
        layer((torch.randn(64, 2) * 300).half())
    torch.testing.assert_close(layer.running_var, torch.full((2,), 9e4), rtol=0.2, atol=0)


@pytest.mark.parametrize("value", [2026.0, 1e6])
def test_constant_columns(value: float):
    layer, x = bn.BatchNorm1d(1, momentum=0.01), torch.full((64, 1), value)
    for _ in range(4000):
        layer(x)
    assert layer.eval()(x).abs().max() < 1e-3


def test_huge_columns_are_told():
    x = torch.randn(512, 1) * 1e20
    with pytest.warns(UserWarning, match=r"running_var is not finite.*scale the input"):
        bn.BatchNorm1d(1)(x)
    with pytest.raises(BatchNormError, match="scale the input"):
        bn.calibrate(nn.Sequential(bn.BatchNorm1d(1), nn.Linear(1, 2)), [x])


def test_the_rounding_of_an_average_is_not_other_data():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(512, 1), torch.full((512, 1), 1e6)], 1)
    for norm, cause in ((bn.BatchNorm1d(2), None), (nn.BatchNorm1d(2), "rounding")):
        net = nn.Sequential(norm, nn.Linear(2, 2))
        for _ in range(500):
            net[0](x[torch.randint(512, (64,))])
        assert bn.diagnose(net, list(x.split(64))).layers[0].cause == cause


# Padding, subclasses, layers that keep nothing


@pytest.mark.parametrize("padding", [0, 500])
def test_lengths_inside_the_forward_of_someone_else(padding: int):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv1d(8, 8, 1), bn.BatchNorm1d(8), nn.SiLU())

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
            return self.net(x)

    net, lengths, x = Encoder(), torch.tensor([9, 4]), torch.randn(2, 8, 9 + padding)
    valid = torch.cat([net.net[0](x)[i, :, :k] for i, k in enumerate(lengths.tolist())], 1)
    with bn.mask_padding(net, lengths):
        net(x, lengths)
    torch.testing.assert_close(net.net[1].running_mean, 0.1 * valid.mean(1).detach(), rtol=1e-6, atol=1e-6)


def test_freezing_a_subclass_and_a_synchronized_layer():
    class Act(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(super().forward(x))

    for norm in (Act(4), nn.SyncBatchNorm(4)):
        net, x = nn.Sequential(nn.Conv2d(3, 4, 3), norm), torch.randn(4, 3, 7, 7)
        expected = copy.deepcopy(net).eval()(x)
        bn.freeze(net).train()
        torch.testing.assert_close(net(x), expected)
        assert not net[1].running_mean.any()


def test_layers_without_running_statistics():
    with pytest.raises(ValueError, match="keeps no running statistics") as caught:
        bn.BatchNorm1d(3, track_running_stats=False).eval()(torch.randn(1, 3))
    assert ".eval()" not in str(caught.value)
    net = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)).eval()
    data = [torch.randn(8, 3) for _ in range(4)]
    net[1].track_running_stats = True
    bn.calibrate(net, data)
    torch.testing.assert_close(net[1].running_var, net[0](torch.cat(data)).var(0))


# Folding, states, files


def test_what_folding_leaves():
    net, x = folded()
    program = torch.export.export(net, (x,))
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    empty = copy.deepcopy(net).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for value in (*empty.parameters(), *empty.buffers()):
            value.fill_(math.nan)
    empty.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(empty(x), net(x))
    meta = copy.deepcopy(net).to("meta")
    meta.load_state_dict(net.state_dict(), strict=True, assign=True)
    assert torch.equal(meta(x), net(x))


def test_assigned_states_share_no_rows():
    layer = bn.BatchNorm2d(4, domains=2)
    layer.load_state_dict(nn.BatchNorm2d(4).state_dict(), assign=True)
    layer(torch.randn(3, 4, 5, 5) + 5)
    assert not layer.running_mean[1].any()
    steps = bn.BatchNorm1d(4, pool="frame", max_steps=3)
    steps.load_state_dict(nn.BatchNorm1d(4).state_dict(), assign=True)
    steps(torch.randn(6, 2, 4))
    assert steps.running_mean[:2].any(1).all()
    assert not steps.running_mean[2].any()
    renorm = bn.BatchNorm1d(4, renorm=bn.Renorm(warmup=0))
    meta = copy.deepcopy(renorm).to("meta")
    meta.load_state_dict(renorm.state_dict(), assign=True)
    expected = copy.deepcopy(renorm)(torch.ones(2, 4))
    torch.testing.assert_close(meta(torch.ones(2, 4)), expected)


def test_keras_2_renorm_and_the_fused_variance(tmp_path: Any):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    keys = ["gamma", "beta", "moving_mean", "moving_variance"]
    settings = {"name": "bn", "axis": [3], "momentum": 0.99, "epsilon": 1e-3}
    model = {"name": "s", "layers": [{"class_name": "BatchNormalization", "config": settings}]}
    with h5py.File(tmp_path / "keras2.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": model})
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [b"bn"]
        group = weights.create_group("bn")
        group.attrs["weight_names"] = [f"bn/{key}:0".encode() for key in keys]
        for key in keys:
            group.create_dataset(f"bn/{key}:0", data=torch.full((3,), 2.0 if "var" in key else 0.5).numpy())
    layer = bn.load_keras(nn.Sequential(bn.BatchNorm2d(3)), tmp_path / "keras2.h5")[0].train()
    x = torch.randn(2, 3, 1, 1)
    layer(x)
    torch.testing.assert_close(layer.running_var, 0.99 * 2 + 0.01 * x.flatten(1).var(0))


def test_states_of_arrays_are_averaged():
    net = nn.Sequential(bn.BatchNorm1d(2))
    state = {key: value.numpy() for key, value in net.state_dict().items()}
    bn.average_statistics(net, [state, state], weights=[1, 2])
    torch.testing.assert_close(net[0].running_var, torch.ones(2))


def test_a_layer_that_was_cut():
    layer, keep = bn.BatchNorm1d(4, running="cumulative", nonfinite="skip_channel"), torch.tensor([0, 2])
    layer(torch.randn(8, 4))
    for each in (layer, bn.BatchNorm1d(4, renorm=bn.Renorm(warmup=0))):
        for key in ("weight", "bias"):
            setattr(each, key, nn.Parameter(getattr(each, key).data[keep]))
        each.running_mean, each.running_var, each.num_features = each.running_mean[keep], each.running_var[keep], 2
        if each is layer:
            with pytest.raises(InputError, match="num_batches_skipped"):
                each(torch.randn(8, 2))
        else:
            each(torch.randn(8, 2))


# Domains, places, pools


def test_gamma_and_beta_by_domain():
    assert "affine_by" in inspect.signature(bn.BatchNorm2d.__init__).parameters
    layer = bn.BatchNorm2d(4, domains=2, affine_by="domain")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    bn.use_domain(layer, 1)
    before = layer.weight_1.clone(), layer.bias_1.clone()
    bn.use_domain(layer, 0)
    layer(torch.randn(3, 4, 5, 5)).pow(3).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight_1, before[0])
    assert torch.equal(layer.bias_1, before[1])
    assert not torch.equal(layer.weight, before[0])


def test_one_layer_at_two_places():
    torch.manual_seed(0)
    norm, linear = bn.BatchNorm1d(8), nn.Linear
    net = nn.Sequential(linear(8, 8), norm, nn.ReLU(), linear(8, 8), norm, nn.ReLU(), linear(8, 2))
    nn.init.constant_(net[3].bias, 5.0)
    data = [torch.randn(64, 8) for _ in range(8)]
    for x in data * 6:
        net(x)
    kinds = [finding.kind for finding in bn.diagnose(net, data).findings]
    assert "several_places" in kinds
    assert "unlike_batches" not in kinds


def test_normalization_of_samples_becomes_group_norm():
    net, x = nn.Sequential(nn.Conv2d(3, 32, 3), bn.BatchNorm2d(32)), torch.randn(2, 3, 7, 7)
    gamma = net[1].weight
    bn.convert(net, ghost_size=1, channel_groups=2, source="batch", update="never")
    bn.convert(net, x, to="group_norm")
    assert type(net[1]) is nn.GroupNorm
    assert net[1].weight is gamma


def test_pools_of_one_value_leave_the_variance_alone():
    x, mean, var = torch.randn(1, 5, 3) + 7, torch.zeros(5, 3), torch.ones(5, 3)
    bn.functional.batch_norm(x, mean, var, training=True, pool="frame")
    layer = bn.BatchNorm1d(3, pool="frame", max_steps=5)
    layer(x)
    torch.testing.assert_close(layer.running_var, torch.ones(5, 3))
    torch.testing.assert_close(var, layer.running_var)
    x, keep = torch.randn(4, 3) + 7, torch.tensor([True, False, False, False])
    by_mask, by_weights = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    by_mask(x, mask=keep), by_weights(x, weights=keep.float())
    torch.testing.assert_close(by_mask.running_var, torch.ones(3))
    torch.testing.assert_close(by_weights.running_var, by_mask.running_var)
