"""Exported networks compute the same, and the preview says beforehand what they will be made of."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from small_networks import mobilenet, randomize, resnet
from torch import nn

import batchnorm as bn

IMAGES = torch.randn(2, 3, 16, 16)


def folded(net):
    return bn.fold(net.eval(), IMAGES).model


def frozen_in_training(net):
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return bn.freeze(net).train()


FORMS = {
    "unfolded": lambda net: net.eval(),
    "ours": lambda net: bn.accelerate(net.eval(), IMAGES),
    "folded": folded,
    "frozen in training": frozen_in_training,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_the_same_in_every_runtime(form, tmp_path):
    runtime, exporter = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    assert exporter
    net = randomize(mobilenet() if form == "folded" else resnet())
    expected = net.eval()(IMAGES).detach()
    ready = FORMS[form](net)
    program = torch.export.export(ready, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, (), tmp_path / "net.onnx", external_data=False, verbose=False)
    session = runtime.InferenceSession((tmp_path / "net.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_preview():
    net = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    ).eval()
    preview = bn.preview_export(net, IMAGES)
    assert preview.foldable == 1
    assert not preview.warnings
    assert "running statistics as constants" in preview.layers[0].becomes
    assert net[1].training is False
    preview = bn.preview_export(net.train(), IMAGES)
    assert [w.split(":")[0] for w in preview.warnings] == ["1", "3"]
    assert "writes the running statistics" in preview.layers[0].becomes
    assert "training mode" in str(preview)
    preview = bn.preview_export(bn.freeze(net), IMAGES)
    assert not preview.warnings
    left = bn.preview_export(bn.fold(bn.unfreeze(net).eval(), IMAGES).model, IMAGES)
    assert "a multiplication" in left.layers[0].becomes
    assert left.to_dict()["layers"][0]["layer"] == "3"


class Output(nn.Module):
    """The output of a recurrent layer alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


STEPS = torch.randn(2, 3, 4)
EVALUATED = {
    "example_weight": lambda: (nn.Sequential(bn.BatchNorm2d(3, example_weight=0.3)), IMAGES),
    "frame": lambda: (nn.Sequential(bn.BatchNorm1d(4, pool="frame", max_steps=3)), STEPS),
    "Standardize": lambda: (nn.Sequential(bn.Standardize(3)), IMAGES),
    "activation": lambda: (nn.Sequential(bn.BatchNorm2d(3, activation="relu")), IMAGES),
    "recurrent": lambda: (Output(bn.GRU(4, 5, batch_norm="frame", max_steps=2, recurrent=True)), STEPS),
    "recurrent, folded": lambda: (bn.fold(Output(bn.LSTM(4, 5, batch_norm="sequence")).eval(), STEPS).model, STEPS),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_exported_in_core_operators(name):
    """Those that every tool of deployment reads; `_assert_tensor_metadata` is export's own, and computes nothing."""
    net, x = EVALUATED[name]()
    program = torch.export.export(net.eval(), (x,)).run_decompositions()
    called = {n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    called -= {torch.ops.aten._assert_tensor_metadata.default}
    assert called
    assert {str(each) for each in called if torch.Tag.core not in each.tags} == set()
    torch.testing.assert_close(program.module()(x), net(x))


class Sequences(nn.Module):
    """A masked normalization, and a recurrent layer with statistics for each time step."""

    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm1d(4)
        self.recurrent = bn.GRU(4, 5, batch_first=True, batch_norm="frame", max_steps=2, recurrent=True)

    def forward(self, x, mask, lengths=None):
        y = self.norm(x.transpose(1, 2), mask=mask).transpose(1, 2)
        return self.recurrent(y, lengths=lengths)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_masks_and_recurrent_layers(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    net = Sequences().train()
    inputs = torch.randn(3, 3, 4), torch.rand(3, 3) < 0.7
    net(torch.randn(3, 3, 4), inputs[1])
    preview = bn.preview_export(net, inputs)
    assert [w.split(":")[0] for w in preview.warnings] == ["norm", "recurrent"]
    expected = net.eval()(*inputs).detach()
    preview = bn.preview_export(net, inputs)
    assert preview.exports
    assert not preview.warnings
    assert "no others" in preview.layers[1].becomes
    program = torch.export.export(net, inputs)
    torch.testing.assert_close(program.module()(*inputs), expected)
    torch.onnx.export(program, (), tmp_path / "net.onnx", external_data=False, verbose=False)
    session = runtime.InferenceSession((tmp_path / "net.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    np.testing.assert_allclose(session.run(None, feed)[0], expected.numpy(), rtol=1e-4, atol=1e-5)
    preview = bn.preview_export(net, (*inputs, torch.tensor([3, 2, 1])))
    assert not preview.exports
    assert "no lengths=" in str(preview)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_of_training_mode_is_what_the_preview_warns_of(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    net, x = nn.Sequential(bn.BatchNorm2d(3)).train(), torch.randn(4, 3, 5, 5)
    nn.init.constant_(net[0].running_mean, 5.0)
    preview = bn.preview_export(net, x)
    assert "does not say so" in preview.layers[0].becomes
    program = torch.export.export(net, (x,))
    torch.onnx.export(program, (), tmp_path / "net.onnx", external_data=False, verbose=False)
    session = runtime.InferenceSession((tmp_path / "net.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(actual, net.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    net[0].running_mean.zero_()
    assert bool((program.module()(x).mean((0, 2, 3)).abs() < 1e-5).all())


def test_the_preview_warns_of_tools_that_err_on_half_precision():
    def preview(dtype, eps=1e-5, variance=1.0):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=eps)).eval().to(dtype)  # statistics, too
        net[1].running_var[0] = variance
        return bn.preview_export(net, torch.randn(2, 3, 6, 6, dtype=dtype)).warnings

    assert preview(torch.float32, 1e-8, 0.0) == ()
    assert preview(torch.float16) == preview(torch.float16, 1e-8) == preview(torch.float16, 1e-5, 0.0) == ()
    (warning,) = preview(torch.float16, 1e-8, 0.0)
    assert warning.startswith("1: in float16 a channel's variance + eps is 0")
    (warning,) = preview(torch.bfloat16)
    assert "writes float32 weights into a bfloat16 model" in warning


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_network_of_half_precision_runs_elsewhere(tmp_path):
    """Its running statistics are float32, and an exporter that fuses must not mix the two."""
    runtime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), bn.BatchNorm2d(4, affine=False))
    for layer in net[1:]:
        layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    net, x = net.half().eval(), torch.randn(2, 3, 6, 6).half()
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", external_data=False, verbose=False)
    session = runtime.InferenceSession((tmp_path / "net.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(actual, net(x).detach().numpy(), rtol=2e-3, atol=2e-3)


def test_the_preview_tells_of_openvino_where_it_counts():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert any("OpenVINO" in note for note in bn.preview_export(net, torch.randn(2, 3, 6, 6)).notes)
    net, x = net.double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert not any("OpenVINO" in note for note in bn.preview_export(net, x).notes)
