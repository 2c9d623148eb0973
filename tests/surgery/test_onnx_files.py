"""ONNX files fold by the rules of `fold`: exactly, or not at all, and they say what stayed and why."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_networks import mobilenet, randomize, resnet

from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.files import fold_onnx, save_onnx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT, HALF, BRAIN, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE


class Model:
    """A hand-made model: nodes in order, random constants, the input x and outputs."""

    def __init__(self, *shape, opset=18, ir=9, kind=FLOAT):
        self.shape, self.opset, self.ir, self.kind = shape, opset, ir, kind
        self.random = np.random.default_rng(0)
        self.nodes, self.tensors, self.inputs, self.infos = [], [], [], []

    def constant(self, name, *shape, positive=False, value=None, kind=None):
        if value is None:
            value = self.random.uniform(0.5, 2, shape) if positive else self.random.normal(size=shape)
        dtype = helper.tensor_dtype_to_np_dtype(kind or self.kind)
        self.tensors.append(numpy_helper.from_array(np.asarray(value).astype(dtype), name))
        return name

    def node(self, operator, inputs, output, name=None, **attributes):
        outputs = output.split()
        node = helper.make_node(operator, inputs.split(), outputs, name=name or output, **attributes)
        self.nodes.append(node)
        return node

    def norm(self, source, output, channels, positive=False, name=None, **attributes):
        name = name or output
        parts = [
            self.constant(f"{name}.weight", channels, positive=positive),
            self.constant(f"{name}.bias", channels),
            self.constant(f"{name}.mean", channels),
            self.constant(f"{name}.var", channels, positive=True),
        ]
        return self.node("BatchNormalization", " ".join([source, *parts]), output, name, **attributes)

    def save(self, path, outputs="z", rank=None):
        values = [
            helper.make_tensor_value_info(o, self.kind, None if rank is None else [None] * rank)
            for o in outputs.split()
        ]
        x = helper.make_tensor_value_info("x", self.kind, self.shape)
        inputs = [x, *self.inputs]
        if self.ir < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.tensors]
        graph = helper.make_graph(self.nodes, "g", inputs, values, self.tensors, value_info=self.infos)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir, producer_name="hand")
        helper.set_model_props(model, {"author": "me"})
        onnx.save(inferred(model), path)
        return path


def inferred(model):
    """With the shapes of the outputs, which the checker wants."""
    known = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.output}
    for value in model.graph.output:
        value.CopyFrom(known[value.name])
    return model


def kinds(model):
    return [node.op_type for node in model.graph.node]


def run(model, feed):
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def exact(path, model):
    """Whether the folded model, with all optimizations on and other inputs, still gives what the file gives."""
    original = onnx.load(path)
    given = {}
    for value in original.graph.input:
        dims = [d.dim_value or 5 for d in value.type.tensor_type.shape.dim]
        given[value.name] = np.random.default_rng(7).normal(size=dims).astype(np.float32)
    names = {t.name for t in original.graph.initializer}
    given = {k: v for k, v in given.items() if k not in names}
    for a, b in zip(run(original, given), run(model, given), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())
    return True


CONVOLUTIONS = {
    "plain": ("Conv", (6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "grouped": ("Conv", (6, 2, 3, 3), {"group": 2, "strides": [2, 2]}),
    "depthwise": ("Conv", (8, 1, 3, 3), {"group": 4, "auto_pad": "SAME_UPPER"}),
    "1d": ("Conv", (6, 4, 3), {"dilations": [2]}),
    "3d": ("Conv", (6, 4, 2, 2, 2), {}),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), {"strides": [2, 2], "output_padding": [1, 1]}),
    "transposed, grouped": ("ConvTranspose", (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_after_convolutions(name, bias, tmp_path):
    kind, shape, attributes = CONVOLUTIONS[name]
    channels = shape[1] * attributes.get("group", 1) if kind == "ConvTranspose" else shape[0]
    m = Model("batch", 4, *[6] * (len(shape) - 2))
    weights = [m.constant("w", *shape), *([m.constant("b", channels)] if bias else [])]
    m.node(kind, " ".join(["x", *weights]), "y", "conv", **attributes)
    m.norm("y", "z", channels, epsilon=1e-3)
    path = m.save(tmp_path / "m.onnx")
    before = path.read_bytes()
    model, certificate = fold_onnx(path)
    assert kinds(model) == [kind]
    assert [(i.layer, i.into) for i in certificate.folded] == [("z", "conv")]
    assert {t.name for t in model.graph.initializer} == ({"w", "b"} if bias else {"w", "conv.bias"})
    assert model.metadata_props[0].value == "me"
    assert exact(path, model)
    assert path.read_bytes() == before


LINEAR = {
    "plain": ("Gemm", (4, 3), {}),
    "transposed weight": ("Gemm", (3, 4), {"transB": 1}),
    "factors": ("Gemm", (4, 3), {"alpha": 0.5, "beta": -2.0}),
    "product": ("MatMul", (4, 3), {}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("before", [True, False])
def test_around_linear_layers(name, bias, before, tmp_path):
    kind, shape, attributes = LINEAR[name]
    m = Model("batch", 4)
    source, target = ("n", "z") if before else ("x", "y")
    if before:
        m.norm("x", "n", 4)
    names = [source, m.constant("w", *shape)]
    if kind == "Gemm":
        m.node(kind, " ".join([*names, *([m.constant("b", 3)] if bias else [])]), target, "fc", **attributes)
    elif bias:
        m.node(kind, " ".join(names), "p", "fc")
        m.node("Add", f"{m.constant('b', 1, 3)} p", target)
    else:
        m.node(kind, " ".join(names), target, "fc")
    if not before:
        m.norm("y", "z", 3)
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert [i.into for i in certificate.folded] == ["fc"]
    assert kinds(model) == (["Gemm"] if kind == "Gemm" else ["MatMul", "Add"])
    assert exact(tmp_path / "m.onnx", model)


def test_a_transposed_input_of_gemm(tmp_path):
    m = Model(4, 5)
    m.norm("x", "n", 5)
    m.node("Gemm", f"n {m.constant('w', 4, 3)}", "y", "fc", transA=1)
    m.norm("y", "z", 3)
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert [i.layer for i in certificate.folded] == ["z"]
    assert [i.layer for i in certificate.kept] == ["n"]
    assert exact(tmp_path / "m.onnx", model)


BETWEEN = {
    "Identity": (True, {}),
    "Dropout": (True, {}),
    "AveragePool": (True, {"kernel_shape": [2, 2]}),
    "AveragePool, padded": (True, {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}),
    "AveragePool, padding counted": (False, {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    "MaxPool": (True, {"kernel_shape": [2, 2]}),
    "MaxPool, negative": (False, {"kernel_shape": [2, 2]}),
    "GlobalAveragePool": (True, {}),
    "GlobalMaxPool": (True, {}),
    "Relu": (False, {}),
    "Transpose": (True, {"perm": [0, 1, 3, 2]}),
    "Transpose, channels": (False, {"perm": [0, 2, 1, 3]}),
    "ReduceMean": (True, {"axes": [2]}),
    "LpPool": (False, {"kernel_shape": [2, 2]}),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_operators_between(name, tmp_path):
    crosses, attributes = BETWEEN[name]
    operator = name.partition(",")[0]
    m = Model("batch", 3, 6, 6, opset=17)
    m.node("Conv", f"x {m.constant('w', 6, 3, 1, 1)}", "y", "conv")
    m.node(operator, "y", "p", **attributes)
    m.norm("p", "z", 6, positive="negative" not in name)
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert bool(certificate.folded) == crosses, certificate
    assert len(certificate.kept) == (not crosses)
    if name in ("Relu", "LpPool", "AveragePool, padding counted"):
        assert operator in certificate.kept[0].reason
    assert exact(tmp_path / "m.onnx", model)


def test_reshapes_concatenations_splits_and_chains(tmp_path):
    m = Model("batch", 3, 4, 4)
    m.norm("x", "n", 3, name="first")
    for i in range(2):
        m.node("Conv", f"n {m.constant(f'w{i}', 2, 3, 1, 1)}", f"c{i}")
    m.node("Concat", "c0 c1", "cat", axis=1)
    m.norm("cat", "b", 4, name="second")
    m.norm("b", "b2", 4, name="third")
    m.node("Split", "b2", "s0 s1", axis=1, num_outputs=2)
    m.node("Conv", f"s0 {m.constant('w2', 2, 2, 1, 1)}", "t0")
    m.node("Conv", f"s1 {m.constant('w3', 2, 2, 1, 1)}", "t1")
    m.node("Add", "t0 t1", "sum")
    m.node("Relu", "sum", "r")
    m.norm("r", "f", 2, name="fourth")
    m.node("Flatten", "f", "flat")
    m.node("Gemm", f"flat {m.constant('w4', 32, 5)}", "g", "fc")
    m.norm("g", "z", 5, name="fifth")
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert not certificate.kept
    assert len(certificate.folded) == 5
    assert "BatchNormalization" not in kinds(model)
    assert exact(tmp_path / "m.onnx", model)


def test_what_stays_takes_its_neighbour_in(tmp_path):
    m = Model("batch", 3, 4, 4)
    m.node("Relu", "x", "r")
    m.norm("r", "a", 3)
    m.norm("a", "b", 3, epsilon=0.1)
    m.node("Relu", "b", "z")
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert len(certificate.folded) == len(certificate.kept) == 1
    assert kinds(model) == ["Relu", "BatchNormalization", "Relu"]
    assert exact(tmp_path / "m.onnx", model)


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [0, 0, 1, 1]])
def test_before_convolutions_padding_is_refused(pads, tmp_path):
    m = Model("batch", 3, 5, 5)
    m.norm("x", "n", 3)
    m.node("Conv", f"n {m.constant('w', 4, 3, 3, 3)}", "z", pads=pads)
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    if any(pads):
        assert "padding cannot be given a value" in certificate.kept[0].reason
    else:
        assert kinds(model) == ["Conv"]
    assert exact(tmp_path / "m.onnx", model)


def test_before_a_transposed_convolution_is_refused(tmp_path):
    m = Model("batch", 4, 5, 5)
    m.norm("x", "n", 4)
    m.node("ConvTranspose", f"n {m.constant('w', 4, 3, 1, 1)}", "z", output_padding=[1, 1], strides=[2, 2])
    _, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert "inserts are zero" in certificate.kept[0].reason


def test_an_output_keeps_its_name_when_the_norm_goes(tmp_path):
    m = Model("batch", 3, 4, 4)
    m.node("Conv", f"x {m.constant('w', 4, 3, 1, 1)}", "y")
    m.node("Shape", "y", "size")
    m.node("Dropout", "y", "d")
    m.norm("d", "z", 4)
    m.node("Relu", "z", "r")
    m.infos.append(helper.make_tensor_value_info("d", FLOAT, ["batch", 4, 4, 4]))
    m.nodes.append(helper.make_node("Reshape", ["r", "size"], ["again"]))
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx", "z again"))
    assert len(certificate.folded) == 1
    assert [o.name for o in model.graph.output] == ["z", "again"]
    assert not model.graph.value_info
    onnx.checker.check_model(model, full_check=True)
    assert exact(tmp_path / "m.onnx", model)


def trapped(name):
    m = Model("batch", 4, 5, 5)
    m.constant("w", 4, 4, 1, 1)
    conv = m.node("Conv", "x w", "y", "conv")
    norm = m.norm("y", "z", 4)
    outputs = "z"
    if name == "used elsewhere":
        m.node("Relu", "y", "r")
        outputs = "z r"
    if name == "an output":
        outputs = "z y"
    if name == "relu between":
        m.nodes.insert(1, helper.make_node("Relu", ["y"], ["r"]))
        norm.input[0] = "r"
    if name == "computed weight":
        m.nodes.insert(0, helper.make_node("Abs", ["w"], ["v"]))
        conv.input[1] = "v"
    if name == "weight that callers may set":
        m.inputs.append(helper.make_tensor_value_info("w", FLOAT, [4, 4, 1, 1]))
    if name == "statistics that callers may set":
        m.inputs.append(helper.make_tensor_value_info("z.mean", FLOAT, [4]))
    if name == "training":
        norm.attribute.append(helper.make_attribute("training_mode", 1))
        norm.output.extend(["m", "v"])
    if name == "not finite":
        m.tensors[-1].CopyFrom(numpy_helper.from_array(np.full(4, -1, np.float32), "z.var"))
    if name == "overflow":
        m.tensors[1].CopyFrom(numpy_helper.from_array(np.full(4, 3e38, np.float32), "z.weight"))
    if name == "its own bias":
        m.nodes.insert(1, helper.make_node("Add", ["y", m.constant("map", 1, 4, 5, 5)], ["s"]))
        norm.input[0] = "s"
    if name == "used in a branch":
        yes, no = (
            helper.make_graph(
                [helper.make_node("Identity", [source], [target])],
                target,
                [],
                [helper.make_tensor_value_info(target, FLOAT, ["p", 4, "q", "r"])],
            )
            for source, target in (("y", "t"), ("z", "f"))
        )
        m.constant("c", value=True, kind=TensorProto.BOOL)
        m.nodes.append(helper.make_node("If", ["c"], ["w2"], then_branch=yes, else_branch=no))
        outputs = "z w2"
    return m, outputs


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("used elsewhere", "also goes to a call of Relu"),
        ("an output", "also goes to the network's output"),
        ("relu between", "Relu"),
        ("computed weight", "'conv', whose weight or bias is computed"),
        ("weight that callers may set", "inputs? that callers may set"),
        ("statistics that callers may set", "inputs that callers may set"),
        ("training", "statistics of each batch"),
        ("not finite", "not finite"),
        ("overflow", "overflow"),
        ("its own bias", "a call of Add"),
        ("used in a branch", "also goes to a call of If"),
    ],
)
def test_traps_are_kept_with_the_reason(name, reason, tmp_path):
    m, outputs = trapped(name)
    path = m.save(tmp_path / "m.onnx", outputs)
    before = onnx.load(path).graph
    model, certificate = fold_onnx(path)
    assert [item.layer for item in certificate.kept] == ["z"]
    assert re.search(reason, certificate.kept[0].reason), certificate
    assert model.graph == before


def test_constants_that_others_read_are_copied(tmp_path):
    m = Model("batch", 4, 5, 5)
    m.constant("w", 4, 4, 1, 1)
    m.node("Conv", "x w", "y", "conv")
    m.norm("y", "z", 4)
    m.node("Conv", "x w", "other")
    m.node("Constant", "", "held", value=numpy_helper.from_array(np.ones((2, 4, 1, 1), np.float32)))
    m.nodes[-1].input[:] = []
    m.node("Conv", "x held", "c2")
    m.norm("c2", "z2", 2)
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx", "z other z2"))
    assert len(certificate.folded) == 2
    assert kinds(model) == ["Conv"] * 3
    assert model.graph.node[1].input[1] == "w"
    assert exact(tmp_path / "m.onnx", model)


def test_a_norm_in_a_branch_and_one_whose_result_a_branch_reads(tmp_path):
    m = Model("batch", 4, 5, 5)
    m.node("Conv", f"x {m.constant('w', 4, 4, 1, 1)}", "y", "conv")
    m.norm("y", "n", 4)
    inner = m.norm("n", "t", 4, name="inner")
    m.nodes.remove(inner)
    info = [helper.make_tensor_value_info(name, FLOAT, ["p", 4, "q", "r"]) for name in ("t", "f")]
    yes = helper.make_graph([inner], "yes", [], info[:1])
    no = helper.make_graph([helper.make_node("Identity", ["n"], ["f"])], "no", [], info[1:])
    m.constant("c", value=True, kind=TensorProto.BOOL)
    m.nodes.append(helper.make_node("If", ["c"], ["z"], then_branch=yes, else_branch=no))
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert [i.layer for i in certificate.folded] == ["n"]
    assert [(i.layer, i.reason) for i in certificate.kept] == [("inner", "it is inside a branch or a loop")]
    onnx.checker.check_model(model, full_check=True)
    assert exact(tmp_path / "m.onnx", model)


VERSIONS = [(7, 3), (8, 3), (9, 4), (12, 7), (14, 8), (15, 8), (18, 9), (21, 10), (22, 10)]


@pytest.mark.parametrize(("opset", "ir"), VERSIONS)
def test_versions(opset, ir, tmp_path):
    m = Model("batch", 4, 5, 5, opset=opset, ir=ir)
    m.node("Conv", f"x {m.constant('w', 6, 4, 3, 3)} {m.constant('b', 6)}", "y", "conv")
    m.norm("y", "d", 6, **({"spatial": 1} if opset < 9 else {}))
    m.node("Dropout", "d", "z")
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert len(certificate.folded) == 1
    assert kinds(model) == ["Conv", "Dropout"]
    assert (model.ir_version, model.opset_import[0].version) == (ir, opset)
    assert len(model.graph.input) == (3 if ir < 4 else 1)
    onnx.checker.check_model(model, full_check=True)
    assert exact(tmp_path / "m.onnx", model)


def test_normalization_by_position_stays(tmp_path):
    m = Model("batch", 4, 3, opset=8, ir=3)
    m.node("Conv", f"x {m.constant('w', 4, 4, 1)}", "y")
    m.norm("y", "z", 4, spatial=0)
    for tensor in m.tensors[1:]:
        value = np.broadcast_to(numpy_helper.to_array(tensor)[:, None], (4, 3))
        tensor.CopyFrom(numpy_helper.from_array(np.array(value), tensor.name))
    _, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert "spatial=0" in certificate.kept[0].reason


@pytest.mark.parametrize(("kind", "accepted"), [(HALF, 1e-2), (BRAIN, 5e-2), (DOUBLE, 1e-10)])
def test_other_dtypes(kind, accepted, tmp_path):
    m = Model("batch", 4, 5, 5, kind=kind, opset=22, ir=10)
    m.node("Conv", f"x {m.constant('w', 6, 4, 3, 3)}", "y", "conv")
    m.norm("y", "z", 6)
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert len(certificate.folded) == 1
    assert certificate.tolerance == accepted
    assert {t.data_type for t in model.graph.initializer} == {kind}
    assert certificate.relative <= accepted


SPELLED = {
    "mul, add": [("Mul", (1, 6, 1, 1)), ("Add", (1, 6, 1, 1))],
    "sub, mul, mul, add": [("Sub", (6, 1, 1)), ("Mul", (1, 6, 1, 1)), ("Mul", (6, 1, 1)), ("Add", (1, 6, 1, 1))],
    "add, div": [("Add", (1, 6, 1, 1)), ("Div", (6, 1, 1))],
    "a scalar": [("Mul", ()), ("Add", (1, 6, 1, 1))],
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("first", [False, True])
def test_batch_norm_that_is_spelled_as_mul_and_add(name, first, tmp_path):
    m = Model("batch", 4, 6, 6)
    m.node("Conv", f"x {m.constant('w', 6, 4, 3, 3)} {m.constant('b', 6)}", "y0", "conv")
    for i, (kind, shape) in enumerate(SPELLED[name]):
        pair = [f"y{i}", m.constant(f"c{i}", *shape, positive=True)]
        m.node(kind, " ".join(reversed(pair) if first and kind != "Div" else pair), f"y{i + 1}")
    m.node("Relu", f"y{len(SPELLED[name])}", "z")
    path = m.save(tmp_path / "m.onnx")
    model, certificate = fold_onnx(path)
    assert kinds(model) == ["Conv", "Relu"]
    assert [item.into for item in certificate.folded] == ["conv"]
    assert exact(path, model)


def test_a_bias_that_is_an_add_of_four_axes(tmp_path):
    """As Paddle writes it: Conv, Add of (1, C, 1, 1), BatchNormalization."""
    m = Model("batch", 4, 6, 6)
    m.node("Conv", f"x {m.constant('w', 6, 4, 3, 3)}", "y", "conv")
    m.node("Add", f"y {m.constant('b', 1, 6, 1, 1)}", "a", "bias")
    m.norm("a", "z", 6)
    path = m.save(tmp_path / "m.onnx")
    model, certificate = fold_onnx(path)
    assert kinds(model) == ["Conv"]
    assert {item.layer for item in certificate.folded} == {"bias", "z"}
    assert exact(path, model)


def test_what_is_spelled_and_stays_is_as_it_was(tmp_path):
    """Behind an activation no layer takes it; by position it is no batch norm; what others read stays."""
    m = Model("batch", 4, 6, 6)
    m.node("Conv", f"x {m.constant('w', 6, 4, 3, 3)}", "y", "conv")
    m.node("Relu", "y", "r")
    m.node("Mul", f"r {m.constant('s', 1, 6, 1, 1)}", "m")
    m.node("Add", f"m {m.constant('t', 1, 6, 1, 1)}", "z")
    with pytest.raises(SurgeryError, match="no BatchNormalization, and z, which compute one, fold into no layer"):
        fold_onnx(m.save(tmp_path / "m.onnx"))
    m.norm("y", "n", 6)  # folds into nothing, since Relu reads y as well
    m.node("Conv", f"x {m.constant('v', 6, 4, 3, 3)}", "q", "other")
    m.node("Mul", f"q {m.constant('p', 1, 6, 1, 4)}", "by_place")
    m.norm("q2", "o", 6)
    m.nodes[-1].input[0] = "by_place"
    path = m.save(tmp_path / "m.onnx", "z n o")
    model, _ = fold_onnx(path)
    assert [n.op_type for n in model.graph.node if n.output[0] in ("m", "z", "by_place")] == ["Mul", "Add", "Mul"]
    assert {t.name for t in model.graph.initializer} >= {"s", "t", "p"}
    assert exact(path, model)


@pytest.mark.parametrize("before", [True, False])
def test_channels_that_are_the_last_axis(before, tmp_path):
    """As TensorFlow has them: around a Transpose to a convolution, or beside a product of sequences."""
    m = Model("batch", 6, 6, 3) if before else Model("batch", 6, 3)
    if before:
        source, operators = "x", ("Mul", "Add")
    else:
        m.node("MatMul", f"x {m.constant('w', 3, 5)}", "y", "fc")
        source, operators = "y", ("Sub", "Mul", "Mul", "Add")
    for i, kind in enumerate(operators):
        m.node(kind, f"{source} {m.constant(f'c{i}', *(() if i == 2 else (3 if before else 5,)))}", f"s{i}")
        source = f"s{i}"
    if before:
        m.node("Transpose", f"{source} ", "t", perm=[0, 3, 1, 2])
        m.nodes[-1].input[:] = [source]
        m.node("Conv", f"t {m.constant('w', 4, 3, 3, 3)}", "z", "conv")
    else:
        m.node("Relu", source, "z")
    path = m.save(tmp_path / "m.onnx")
    model, certificate = fold_onnx(path)
    assert [item.into for item in certificate.folded] == ["conv" if before else "fc"]
    assert kinds(model) == (["Transpose", "Conv"] if before else ["MatMul", "Add", "Relu"])
    assert exact(path, model)


FOREIGN = Path(__file__).parent.parent / "data" / "foreign"
EXPORTED = {
    "keras3.images": ["Transpose", "Conv", "Relu", "Conv", "GlobalAveragePool", "Squeeze", "MatMul", "Add"],
    "tf2onnx.images": ["Transpose", "Conv", "Relu", "Conv", "GlobalAveragePool", "Squeeze", "MatMul", "Add"],
    "keras3.sequences": None,
    "tf2onnx.sequences": None,
}


@pytest.mark.parametrize("name", EXPORTED)
def test_files_that_keras_and_tf2onnx_wrote(name, tmp_path):
    """Each batch normalization goes, however it is spelled; what there was beside it stays."""
    path = tmp_path / "m.onnx"
    path.write_bytes(gzip.decompress((FOREIGN / f"{name}.onnx.gz").read_bytes()))
    model, certificate = fold_onnx(path)
    assert not certificate.kept
    assert not {"Mul", "BatchNormalization"} & set(kinds(model))
    assert EXPORTED[name] in (kinds(model), None)
    assert kinds(model).count("Transpose") == kinds(onnx.load(path)).count("Transpose")
    assert exact(path, model)


@pytest.mark.parametrize("where", ["before", "behind"])
def test_quantized_data_say_what_to_do_first(where, tmp_path):
    m = Model("batch", 4, 5, 5)
    quantized = [m.constant("scale", value=np.float32(0.1))]
    m.constant("zero", value=np.int8(0), kind=TensorProto.INT8)
    conv = f"{{}} {m.constant('w', 6, 4, 3, 3)}"
    first, second = ("y", "z") if where == "behind" else ("n", "z")
    if where == "behind":
        m.node("Conv", conv.format("x"), "y", "conv")
    else:
        m.norm("x", "n", 4)
    m.node("QuantizeLinear", f"{first} {quantized[0]} zero", "q")
    m.node("DequantizeLinear", f"q {quantized[0]} zero", "d")
    if where == "behind":
        m.norm("d", second, 6)
    else:
        m.node("Conv", conv.format("d"), second, "conv")
    _, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert "fold before you quantize" in certificate.kept[0].reason


def test_a_quantized_weight_says_what_to_do_first(tmp_path):
    m = Model("batch", 4, 5, 5)
    m.tensors.append(numpy_helper.from_array(np.ones((6, 4, 3, 3), np.int8), "q"))
    m.node("DequantizeLinear", f"q {m.constant('scale', value=np.float32(0.1))}", "w")
    m.node("Conv", "x w", "y", "conv")
    m.norm("y", "z", 6)
    _, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert "quantized: fold before you quantize" in certificate.kept[0].reason


def test_rounding_of_the_files_own_is_accepted_as_in_fold(tmp_path):
    """Features of 2000 +- 5 lose digits in the file itself: the fold is as near to float64 as the file is."""
    m = Model("batch", 4, 6, 6)
    m.node("Conv", f"x {m.constant('w', 6, 4, 3, 3)} {m.constant('b', value=np.full(6, 2000.0))}", "y", "conv")
    vectors = {"weight": np.ones(6), "bias": np.zeros(6), "mean": np.full(6, 2000.0), "var": np.full(6, 0.02)}
    parts = [m.constant(f"n.{key}", value=value) for key, value in vectors.items()]
    m.node("BatchNormalization", " ".join(["y", *parts]), "z", "n")
    path = m.save(tmp_path / "m.onnx")
    _, certificate = fold_onnx(path)
    assert len(certificate.folded) == 1
    assert certificate.rounding > 1e-6
    assert certificate.error <= 4 * certificate.rounding
    assert all(d.passed for d in certificate.differences)
    with pytest.raises(SurgeryError, match="differs by"):  # a fold that is wrong is none of the file's rounding
        broken(path)


def broken(path):
    """`fold_onnx` whose result (runs 6 to 8, after two to find sizes and three of the file) is half as large again."""
    from unittest import mock

    from batchnorm.surgery import files

    def off(self, example):
        found = call(self, example)
        runs.append(found)
        return {k: v * (1.5 if 5 < len(runs) <= 8 else 1) for k, v in found.items()}

    call, runs = files.Runner.__call__, []
    with mock.patch.object(files.Runner, "__call__", off):
        return fold_onnx(path, {"x": np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)})


def test_float64_without_an_evaluator_runs_in_float32(tmp_path):
    m = Model("batch", 4, 5, 5, kind=DOUBLE, opset=22, ir=10)
    m.node("ConvTranspose", f"x {m.constant('w', 4, 3, 3, 3)}", "y", "conv", group=2, pads=[1, 1, 1, 1])
    m.norm("y", "z", 6)
    model, certificate = fold_onnx(m.save(tmp_path / "m.onnx"))
    assert len(certificate.folded) == 1
    assert certificate.captured_by in ("onnxruntime in float32", "onnx.reference")
    assert {t.data_type for t in model.graph.initializer} == {DOUBLE}


def test_external_data(tmp_path):
    m = Model("batch", 4, 5, 5)
    m.node("Conv", f"x {m.constant('w', 64, 4, 3, 3)}", "y", "conv")
    m.norm("y", "z", 64)
    plain = m.save(tmp_path / "plain.onnx")
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load(plain), tmp_path / "m.onnx", **options)
    model, certificate = fold_onnx(tmp_path / "m.onnx")
    assert len(certificate.folded) == 1
    assert exact(plain, model)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read as an ONNX model"):
        fold_onnx(tmp_path / "m.onnx")


def test_large_models_are_written_with_their_weights_beside(tmp_path, monkeypatch):
    m = Model("batch", 4, 5, 5)
    m.node("Conv", f"x {m.constant('w', 64, 4, 3, 3)}", "y", "conv")
    m.norm("y", "z", 64)
    monkeypatch.setattr("batchnorm.surgery.files.IN_MEMORY", 0)
    monkeypatch.setattr("batchnorm.surgery.onnx_run.IN_MEMORY", 0)
    path = m.save(tmp_path / "m.onnx")
    model, _ = fold_onnx(path)
    save_onnx(model, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "out.onnx.data"]
    assert exact(path, onnx.load(tmp_path / "out.onnx"))


def test_inputs_that_are_given(tmp_path):
    m = Model("batch", 4, "length")
    m.node("Conv", f"x {m.constant('w', 6, 4, 3)}", "y")
    m.norm("y", "z", 6)
    path = m.save(tmp_path / "m.onnx")
    _, certificate = fold_onnx(path, {"x": np.random.default_rng(0).normal(size=(3, 4, 9)).astype(np.float32)})
    assert [d.inputs for d in certificate.differences] == ["example", "random 1", "random 2"]
    with pytest.raises(InputError, match="takes x"):
        fold_onnx(path, {"y": np.zeros(3)})
    with pytest.raises(InputError, match="fails on the given inputs"):
        fold_onnx(path, {"x": np.zeros((3, 5, 9), np.float32)})


def test_exported_networks(tmp_path):
    net, x = randomize(resnet()).eval(), torch.randn(2, 3, 16, 16)
    shapes = ({0: torch.export.Dim("n", min=2)},)
    options = {"external_data": False, "verbose": False, "dynamic_shapes": shapes}
    torch.onnx.export(net, (x,), tmp_path / "n.onnx", optimize=False, **options)  # which folds some by itself
    model, certificate = fold_onnx(tmp_path / "n.onnx")
    assert "BatchNormalization" not in kinds(model)
    assert not certificate.kept
    assert certificate.relative <= 1e-5
    assert exact(tmp_path / "n.onnx", model)


def test_networks_of_the_older_exporter(tmp_path):
    net, x = randomize(mobilenet()).eval(), torch.randn(2, 3, 16, 16)
    options = {"dynamo": False, "dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"], "do_constant_folding": False}
    torch.onnx.export(net, (x,), tmp_path / "n.onnx", training=torch.onnx.TrainingMode.PRESERVE, **options)
    model, certificate = fold_onnx(tmp_path / "n.onnx")
    assert "BatchNormalization" not in kinds(model)
    assert certificate.relative <= 1e-5
    assert exact(tmp_path / "n.onnx", model)


def test_local_functions(tmp_path):
    m = Model("batch", 3, 4, 4)
    m.node("Conv", f"x {m.constant('w', 4, 3, 1, 1)}", "y")
    call = helper.make_node(
        "Normalize", ["y", *(f"n.{k}" for k in ("weight", "bias", "mean", "var"))], ["z"], domain="own"
    )
    m.norm("y", "unused", 4, name="n")
    m.nodes[-1] = call
    path = tmp_path / "m.onnx"
    inner = helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["o"])
    function = helper.make_function(
        "own", "Normalize", ["a", "g", "b", "m", "v"], ["o"], [inner], [helper.make_opsetid("", 18)]
    )
    x = helper.make_tensor_value_info("x", FLOAT, ["batch", 3, 4, 4])
    z = helper.make_tensor_value_info("z", FLOAT, ["batch", 4, 4, 4])
    graph = helper.make_graph(m.nodes, "g", [x], [z], m.tensors)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9), path)
    model, certificate = fold_onnx(path)
    assert len(certificate.folded) == 1
    assert kinds(model) == ["Conv"]
    assert exact(path, model)


def test_files_that_are_none(tmp_path):
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(InputError, match="bad"):
        fold_onnx(tmp_path / "bad")
    m = Model("batch", 3)
    m.node("Relu", "x", "z")
    with pytest.raises(SurgeryError, match="no BatchNormalization"):
        fold_onnx(m.save(tmp_path / "m.onnx"))


def test_a_model_that_does_not_run_is_refused(tmp_path):
    m = Model("batch", 4, 5, 5)
    m.node("Conv", f"x {m.constant('w', 6, 4, 3, 3)}", "y")
    m.norm("y", "n", 6)
    m.constant("shape", value=[1, 7], kind=TensorProto.INT64)
    m.node("Reshape", "n shape", "z")
    with pytest.raises(SurgeryError, match="give inputs that it takes"):
        fold_onnx(m.save(tmp_path / "m.onnx"))
