"""ONNX files and torch.export archives fold by the same rules, and every file says what stayed and why."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Calls, randomize, resnet
from torch import nn

from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.files import fold_archive, fold_onnx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def norm_of(name, source, target, channels, generator, **attributes):
    values = [generator.normal(size=channels) for _ in range(3)] + [generator.uniform(0.5, 2, channels)]
    names = [f"{name}.{key}" for key in ("weight", "bias", "mean", "var")]
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for v, n in zip(values, names, strict=True)]
    node = helper.make_node("BatchNormalization", [source, *names], [target], name=name, **attributes)
    return node, tensors


def saved(path, nodes, tensors, outputs, rank=4):
    value = [helper.make_tensor_value_info(o, TensorProto.FLOAT, [f"{o}{i}" for i in range(rank)]) for o in outputs]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 5, 5][:rank])
    graph = helper.make_graph(nodes, "g", [x], value, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


CONVOLUTIONS = {
    "Conv": ((6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "ConvTranspose": ((4, 3, 3, 3), {"group": 2, "strides": [2, 2]}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, bias, tmp_path):
    shape, attributes = CONVOLUTIONS[kind]
    generator = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(generator.normal(size=shape).astype(np.float32), "w")]
    if bias:
        tensors.append(numpy_helper.from_array(generator.normal(size=6).astype(np.float32), "b"))
    layer = helper.make_node(kind, ["x", "w", "b"][: 2 + bias], ["y"], name="conv", **attributes)
    norm, more = norm_of("bn", "y", "z", 6, generator, epsilon=1e-3)
    model, certificate = fold_onnx(saved(tmp_path / "m.onnx", [layer, norm], [*tensors, *more], ["z"]))
    assert [n.op_type for n in model.graph.node] == [kind]
    assert len(model.graph.initializer) == 2
    assert certificate.relative <= 1e-5
    assert str(certificate.folded[0].into) == "conv"


@pytest.mark.parametrize("transposed", [0, 1])
def test_linear(transposed, tmp_path):
    generator = np.random.default_rng(0)
    shape = (3, 4) if transposed else (4, 3)
    weight = numpy_helper.from_array(generator.normal(size=shape).astype(np.float32), "w")
    layer = helper.make_node("Gemm", ["x", "w"], ["y"], name="fc", transB=transposed)
    norm, more = norm_of("bn", "y", "z", 3, generator)
    model, _ = fold_onnx(saved(tmp_path / "m.onnx", [layer, norm], [weight, *more], ["z"], rank=2))
    assert [n.op_type for n in model.graph.node] == ["Gemm"]


def trapped(name, generator):
    weight = numpy_helper.from_array(generator.normal(size=(4, 4, 1, 1)).astype(np.float32), "w")
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    norm, tensors = norm_of("bn", "y", "z", 4, generator)
    nodes, outputs = [conv, norm], ["z"]
    if name == "used elsewhere":
        nodes.append(helper.make_node("Relu", ["y"], ["r"]))
        outputs.append("r")
    if name == "an output":
        outputs.append("y")
    if name == "relu between":
        nodes.insert(1, helper.make_node("Relu", ["y"], ["r"]))
        norm.input[0] = "r"
    if name == "computed weight":
        nodes.insert(0, helper.make_node("Abs", ["w"], ["v"]))
        conv.input[1] = "v"
    if name == "shared weight":
        nodes.append(helper.make_node("Conv", ["x", "w"], ["other"]))
        outputs.append("other")
    if name == "used in a branch":
        yes, no = (
            helper.make_graph(
                [helper.make_node("Identity", [source], [target])],
                target,
                [],
                [helper.make_tensor_value_info(target, TensorProto.FLOAT, ["p", 4, "q", "r"])],
            )
            for source, target in (("y", "t"), ("z", "f"))
        )
        tensors.append(numpy_helper.from_array(np.array(True), "c"))
        nodes.append(helper.make_node("If", ["c"], ["w2"], then_branch=yes, else_branch=no))
        outputs.append("w2")
    return nodes, [weight, *tensors], outputs


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("used elsewhere", "elsewhere"),
        ("an output", "elsewhere"),
        ("relu between", "Relu"),
        ("computed weight", "computed"),
        ("used in a branch", "elsewhere"),
        ("shared weight", None),
    ],
)
def test_traps(name, reason, tmp_path):
    _, certificate = fold_onnx(saved(tmp_path / "m.onnx", *trapped(name, np.random.default_rng(0))))
    assert len(certificate.kept) == (reason is not None)
    if reason is not None:
        assert reason in certificate.kept[0].reason
    assert certificate.relative <= 1e-5


def test_exported_networks(tmp_path):
    net, x = randomize(resnet()).eval(), torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), tmp_path / "net.onnx", external_data=False, verbose=False, optimize=False)
    model, certificate = fold_onnx(tmp_path / "net.onnx")
    left = sum(n.op_type == "BatchNormalization" for n in model.graph.node)
    assert (left, len(certificate.kept)) == (0, 0)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch.export.save(program, tmp_path / "net.pt2")
    folded, certificate = fold_archive(tmp_path / "net.pt2")
    assert len(certificate.folded) == 6
    torch.export.save(folded, tmp_path / "folded.pt2")
    again, other = torch.export.load(tmp_path / "folded.pt2"), torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(again.module()(other), net(other), rtol=1e-4, atol=1e-4)
    assert not [n for n in again.graph.nodes if "batch_norm" in str(n.target)]


def test_what_an_archive_keeps(tmp_path):
    layers = {"conv": nn.ConvTranspose2d(4, 6, 3, groups=2), "a": nn.BatchNorm2d(6), "b": nn.BatchNorm2d(6)}
    net = Calls(lambda self, x: self.b(F.relu(self.a(self.conv(x)))), **layers)
    torch.export.save(torch.export.export(net, (torch.randn(2, 4, 5, 5),)), tmp_path / "net.pt2")
    _, certificate = fold_archive(tmp_path / "net.pt2")
    assert [(i.layer, i.into) for i in certificate.folded] == [("a", "conv")]
    assert "relu" in certificate.kept[0].reason


def test_files_that_are_none(tmp_path):
    (tmp_path / "bad").write_bytes(b"nothing")
    for fold in (fold_onnx, fold_archive):
        with pytest.raises(InputError, match="bad"):
            fold(tmp_path / "bad")
    node = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(SurgeryError, match="no BatchNormalization"):
        fold_onnx(saved(tmp_path / "m.onnx", [node], [], ["y"]))
