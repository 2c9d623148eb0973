"""The layers that surgery puts into networks: in every recorder and export, and through every way of loading."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import batchnorm as bn
from batchnorm.ops.schemas import ACTIVATIONS
from batchnorm.surgery.layers import CHANNEL_PADDED, LastAxisBatchNorm, ScaleShift

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
NORMS = {1: bn.BatchNorm1d, 2: bn.BatchNorm2d, 3: bn.BatchNorm3d}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def shaken(layer):
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.3, 3)
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


def relu_before(dims, dtype):
    """A batch normalization that no layer takes in, since a ReLU comes before it."""
    conv = getattr(nn, f"Conv{dims}d")(3, 4, 3)
    return nn.Sequential(conv, nn.ReLU(), shaken(NORMS[dims](4))), torch.randn(2, 3, *[6] * dims)


def fused(dims, dtype):
    net, x = relu_before(dims, dtype)
    return nn.Sequential(*net, nn.SiLU()), x


class Concatenated(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.conv = getattr(nn, f"Conv{dims}d")(3, 4, 1)
        self.norm = shaken(NORMS[dims](7))

    def forward(self, x):
        return self.norm(torch.cat([x, self.conv(x)], 1))


def concatenated(dims, dtype):
    return Concatenated(dims), torch.randn(2, 3, *[6] * dims)


def transposed(dims, dtype):
    conv = getattr(nn, f"ConvTranspose{dims}d")(4, 4, 3, padding=1)
    return nn.Sequential(nn.ReLU(), shaken(NORMS[dims](4)), conv), torch.randn(2, 4, *[6] * dims)


def padded(dims, dtype):
    conv = getattr(nn, f"Conv{dims}d")(4, 5, 3, padding=1)
    return nn.Sequential(nn.ReLU(), shaken(NORMS[dims](4)), conv), torch.randn(2, 4, *[6] * dims)


def last_axis(dims, dtype):
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), shaken(bn.BatchNorm1d(4, pool="sequence")), nn.ReLU())
    return net, torch.randn(2, 5, 3)


FORMS = [relu_before, fused, concatenated, transposed, padded, last_axis]


def folded(form, dims=2, dtype=torch.float32):
    torch.manual_seed(0)
    net, x = form(dims, dtype)
    net, x = net.eval().to(dtype), x.to(dtype)
    return net, bn.fold(net, x).model, x


def operators(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def near(one, two):
    limit = TOLERANCES[two.dtype]
    torch.testing.assert_close(one, two, rtol=limit, atol=limit * float(two.detach().abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_no_batch_norm_is_exported(form, dims, dtype):
    net, model, x = folded(form, dims, dtype)
    program = torch.export.export(model, (x,))
    assert not [name for name in operators(program.graph) if "batch_norm" in name or "batchnorm" in name]
    near(program.module()(x), model(x))
    near(model(x), net(x))
    traced = torch.jit.trace(model, x)
    assert "batch_norm" not in str(traced.inlined_graph)
    near(traced(x), model(x))


@pytest.mark.parametrize("form", FORMS)
def test_other_recorders(form):
    _, model, x = folded(form)
    scripted = torch.jit.script(model)
    assert "batch_norm" not in str(scripted.inlined_graph)
    near(scripted(x), model(x))
    graph = make_fx(model)(x)
    assert not [name for name in operators(graph.graph) if "batch_norm" in name or "batchnorm" in name]
    near(graph(x), model(x))
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    leaves = {type(traced.get_submodule(n.target)) for n in traced.graph.nodes if n.op == "call_module"}
    assert leaves & {ScaleShift, *CHANNEL_PADDED.values()} or form is transposed
    assert operators(traced.graph) <= {str(torch.cat)} or form is concatenated


@pytest.mark.parametrize(("form", "dynamo"), [(fused, True), (relu_before, False), (padded, False)])
def test_onnx(form, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _, model, x = folded(form)
    torch.onnx.export(model, (x,), tmp_path / "net.onnx", dynamo=dynamo, verbose=False)
    kinds = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert "BatchNormalization" not in kinds
    assert {"Mul", "Add"} <= kinds or form is padded


@pytest.mark.parametrize("form", FORMS)
def test_uninitialized_memory_is_loaded_over(form):
    _, model, x = folded(form)
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for value in (*empty.parameters(), *empty.buffers()):
            value.fill_(math.nan)
    empty.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(empty(x), model(x))
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).shape == model(x).shape
    meta.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(meta(x), model(x))


def test_a_layer_recorded_as_the_whole_network():
    layer = ScaleShift(torch.randn(4), torch.randn(4), torch.randn(4), activation="relu")
    for x in (torch.randn(3, 4), torch.randn(3, 4, 5), torch.randn(3, 4, 5, 5)):
        traced = torch.fx.symbolic_trace(layer)
        near(traced(x), layer(x))
        near(traced(x, x), layer(x, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_scripted_with_each_activation(activation):
    layer = ScaleShift(torch.randn(4), torch.randn(4), torch.randn(4), activation=activation)
    x = torch.randn(3, 4, 5)
    near(torch.jit.script(layer)(x, x), layer(x, x))


def test_states_and_pickles_of_before_load():
    layer = ScaleShift(torch.randn(4), torch.randn(4), torch.randn(4))
    x = torch.randn(3, 4)
    layer.register_buffer("ones", torch.ones(4), persistent=False)  # as pickles made before have it
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias", "center"}


class Held(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.relu(self.layer(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: bn.Standardize(4).fit(torch.randn(30, 4) * 3 + 1),
        lambda: ScaleShift(torch.randn(4), torch.randn(4), torch.randn(4)),
        lambda: LastAxisBatchNorm(4),
    ],
)
def test_layers_are_leaves_of_torch_fx(layer):
    net = Held(layer())
    before = copy.deepcopy(net.state_dict())
    traced = torch.fx.symbolic_trace(net)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert traced.layer is net.layer
    x = torch.randn(5, 4)
    for mode in (True, False):
        expected = copy.deepcopy(net).train(mode)(x)
        assert torch.equal(traced.train(mode)(x), expected)


def test_verbs_on_networks_that_torch_fx_recorded():
    torch.manual_seed(0)
    conv = nn.Conv2d
    net = nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    shaken(net[1])
    shaken(net[5])
    x = torch.randn(4, 3, 9, 9)
    traced = torch.fx.symbolic_trace(net)
    result = bn.fold(traced, x)
    assert [item.layer for item in result.certificate.folded] == ["1"]
    assert isinstance(result.model.get_submodule("5"), ScaleShift)
    near(result.model(x), net(x))
    again = torch.fx.symbolic_trace(result.model)
    near(again(x), net(x))
    assert [row["name"] for row in bn.summary(traced, x).to_dict()["layers"]] == ["1", "5"]
    frozen = bn.freeze(copy.deepcopy(traced)).train()
    near(frozen(x), net(x))
    assert int(frozen.get_submodule("1").num_batches_tracked) == 0
    bn.calibrate(traced, [x])
    torch.testing.assert_close(traced.get_submodule("1").running_mean, net[0](x).mean((0, 2, 3)))
