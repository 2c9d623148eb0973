"""Tools that record, compile, fuse or swap a layer get the right thing, or an error that says what to do first."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
import torch.fx.experimental.optimization
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from batchnorm.errors import BatchNormError, InputError, SurgeryError

KINDS: dict[int, Any] = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d, 3: bn.BatchNorm3d}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "silu"},
    {"ghost_size": 2},
    {"channel_groups": 2},
    {"renorm": bn.Renorm(warmup=0)},
    {"running": "debiased"},
    {"running": "cumulative"},
    {"running_var": "biased"},
    {"nonfinite": "skip_channel"},
    {"domains": 2},
    {"example_weight": 0.25},
    {"source": "batch", "update": "never"},
    {"source": "running", "update": "always"},
    {"track_running_stats": False},
    {"affine": False},
    {"momentum": None},
    {"pool": "sequence"},
    {"pool": "frame", "max_steps": 7},
]
SPACE = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


CASES = [
    pytest.param(kind, axes, options, id=f"{axes}d-{options}")
    for axes, kind in KINDS.items()
    for options in OPTIONS
    if "pool" not in options or axes == 1
]


def batch(axes, options, samples=8):
    shape = (samples, 5, 4) if "pool" in options else (samples, 4, *SPACE[axes])
    return torch.randn(shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "axes", "options"), CASES)
def test_torch_fx_sees_one_leaf_and_changes_nothing(kind, axes, options, training):
    net = nn.Sequential(nn.Identity(), kind(4, **options), nn.ReLU()).train(training)
    before = copy.deepcopy(net.state_dict())
    traced = torch.fx.symbolic_trace(net)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert traced.get_submodule("1") is net[1]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    x, twin = batch(axes, options), copy.deepcopy(net)
    for mode in (True, False, True):
        assert torch.equal(traced.train(mode)(x), twin.train(mode)(x))
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in net.state_dict().items())


class Uses(nn.Module):
    """A network that hands more than its input to a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, other, *, lengths=None):
        return self.layer(x, residual=other, lengths=lengths) if lengths is not None else self.layer(x, other)


def test_the_other_arguments_are_recorded():
    traced = torch.fx.symbolic_trace(Uses(bn.BatchNorm2d(3, activation="relu")))
    x, other = torch.randn(2, 4, 3, 5, 5)
    expected = copy.deepcopy(traced.layer)(x, other)
    assert torch.equal(traced(x, other), expected)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_norm", [None, "sequence", "frame"])
def test_recurrent_layers_are_leaves(name, batch_norm):
    options = {"max_steps": 9} if batch_norm == "frame" else {}
    layer = getattr(bn, name)(3, 4, batch_norm=batch_norm, **options)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer

        def forward(self, x):
            return self.rnn(x)[0]

    net = Net()
    before = copy.deepcopy(net.state_dict())
    traced = torch.fx.symbolic_trace(net)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn"]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    x = torch.randn(6, 5, 3)
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(traced(x), expected)


class ThenTanh(bn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_subclass_is_recorded_through_its_own_forward(training):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), ThenTanh(4)).train(training)
    before, twin = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    traced = torch.fx.symbolic_trace(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(traced(x), twin(x))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value)
    with pytest.raises(InputError, match="is_leaf_module"):
        torch.fx.symbolic_trace(nn.Sequential(ThenTanh(4, ghost_size=2)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "axes", "options"), CASES)
def test_torch_jit_trace_is_right_for_another_batch_or_refused(kind, axes, options, training):
    if options.get("pool") == "frame":
        pytest.skip("the number of time steps is a constant of a trace")
    torch.manual_seed(0)
    layer = kind(4, **options).train(training)
    x, other = batch(axes, options), batch(axes, options, 6) + 1
    twin = copy.deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(layer, x, check_trace=False)
        except BatchNormError as error:
            refused = str(error)
        else:
            refused = None
    if refused is not None:
        assert "size of this batch" in refused
        return
    twin(x)
    torch.testing.assert_close(traced(other), twin(other), rtol=1e-5, atol=1e-5)
    found = dict(traced.named_buffers())
    for name, value in twin.named_buffers():
        torch.testing.assert_close(found.get(name, value), value, rtol=1e-5, atol=1e-5)


def test_a_trace_in_training_mode_checks_each_batch():
    layer = bn.BatchNorm1d(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, torch.randn(4, 3), check_trace=False)
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        traced(torch.randn(1, 3))
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize("layer", [bn.BatchNorm2d(3).eval(), bn.BatchNorm1d(3, ghost_size=2), bn.LSTM(3, 4)])
def test_torch_jit_script_names_the_way(layer):
    net = nn.Sequential(nn.Identity(), layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SurgeryError, match="convert"):
            torch.jit.script(net)
    assert net[1] is layer


def conv_norm(axes, **options):
    torch.manual_seed(1)
    conv = getattr(nn, f"Conv{axes}d")(2, 4, 1)
    net = nn.Sequential(conv, KINDS[axes](4, **options), nn.ReLU())
    net.train()(torch.randn(6, 2, *SPACE[axes]))
    return net.eval()


@pytest.mark.parametrize("axes", KINDS)
def test_fusers_of_torch_take_a_plain_layer(axes):
    net, x = conv_norm(axes), torch.randn(3, 2, *SPACE[axes])
    expected = net(x)
    fused = torch.ao.quantization.fuse_modules(net, [["0", "1", "2"]])
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, bn.BatchNorm) for m in fused.modules())
    assert isinstance(net[1], KINDS[axes])
    torch.testing.assert_close(fuse_conv_bn_eval(net[0], net[1])(x).relu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.fx.experimental.optimization.fuse(net)(x), expected, rtol=1e-5, atol=1e-5)
    prepared = torch.ao.quantization.fuse_modules_qat(conv_norm(axes).train(), [["0", "1", "2"]])
    assert prepared(x).shape == expected.shape


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"example_weight": 0.5}, {"source": "batch"}])
def test_fusers_of_torch_are_told_of_a_layer_that_is_more(options):
    net = conv_norm(2, **options)
    with pytest.raises(SurgeryError, match=r"convert\(net, to='torch'\)"):
        torch.ao.quantization.fuse_modules(net, [["0", "1", "2"]])


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"ghost_size": 2}, {"source": "running"}, {"domains": 2}])
def test_a_layer_that_is_more_is_not_swapped_for_a_synchronized_one(options):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4, **options))
    before = list(net)
    with pytest.raises(SurgeryError, match=f"would lose {next(iter(options))}="):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert list(net) == before
    with pytest.raises(SurgeryError, match="would lose source"):
        nn.SyncBatchNorm.convert_sync_batchnorm(bn.freeze(nn.Sequential(nn.BatchNorm2d(4))))
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(bn.BatchNorm2d(4)))
    assert type(plain[0]) is nn.SyncBatchNorm


def test_quantization_sets_and_reads_its_configuration():
    layer = bn.BatchNorm2d(4, activation="relu")
    assert not hasattr(layer, "qconfig")
    layer.qconfig = "int8"
    assert copy.deepcopy(layer).qconfig == "int8"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fast_path_of_the_encoder_layer_declines(norm_first, affine):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer.norm1 = bn.BatchNorm1d(8, pool="sequence", affine=affine)
    layer.norm2 = bn.BatchNorm1d(8, pool="sequence", affine=affine)
    x = torch.randn(3, 7, 8) + 2
    layer(x)
    expected = layer.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
        bn.freeze(layer).train().self_attn.eval()
        torch.testing.assert_close(layer(x), expected)


def test_running_statistics_are_taken_out_by_torch_func():
    layer = bn.BatchNorm1d(3)
    torch.func.replace_all_batch_norm_modules_(nn.Sequential(layer))
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer.eval()(x), nn.functional.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("options", [options for options in OPTIONS if "pool" not in options])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_to_mkldnn_computes_the_same_or_refuses(axes, options):
    layer = KINDS[axes](4, **options)
    layer(batch(axes, options))
    net, x = nn.Sequential(layer).eval(), batch(axes, options)
    expected = net(x)
    if {"track_running_stats", "affine"} & options.keys():  # torch's own refusal
        refused: Any = pytest.raises(AssertionError, match="Only support")
    elif {"activation", "domains", "example_weight", "source"} & options.keys():
        refused = pytest.raises(SurgeryError, match="would lose")
    else:
        refused = contextlib.nullcontext()
    made = None
    with refused, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = torch.utils.mkldnn.to_mkldnn(copy.deepcopy(net))
    if made is None:
        return
    torch.testing.assert_close(made(x.to_mkldnn()).to_dense(), expected, rtol=1e-4, atol=1e-5)


def test_to_mkldnn_names_what_would_be_lost():
    with pytest.raises(SurgeryError, match=r"activation='silu'.*bn.fold"):
        torch.utils.mkldnn.to_mkldnn(nn.Sequential(bn.BatchNorm2d(4, activation="silu")).eval())
    layer = bn.BatchNorm2d(4)
    assert layer.affine is True
    assert not hasattr(bn.BatchNorm2d.__new__(bn.BatchNorm2d), "affine")


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip_channel"}, {"running": "debiased"}, {"ghost_size": 4}])
def test_averages_of_weights_measure_statistics_anew(options):
    data = [torch.randn(8, 4) + k for k in range(4)]
    ours, theirs = nn.Sequential(bn.BatchNorm1d(4, **options)), nn.Sequential(nn.BatchNorm1d(4))
    ours(data[0] * 9)
    for net in (ours, theirs):
        torch.optim.swa_utils.update_bn(data, net)
    torch.testing.assert_close(ours[0].running_var, theirs[0].running_var)
    assert ours[0].momentum == 0.1


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip_channel"}, {"renorm": bn.Renorm(warmup=0)}])
def test_functorch_takes_running_statistics_away(options):
    from torch.func import replace_all_batch_norm_modules_

    net, x = replace_all_batch_norm_modules_(nn.Sequential(bn.BatchNorm1d(4, **options))), torch.randn(3, 8, 4)
    y = torch.func.vmap(net)(x)
    torch.testing.assert_close(y[1], nn.BatchNorm1d(4)(x[1]))
