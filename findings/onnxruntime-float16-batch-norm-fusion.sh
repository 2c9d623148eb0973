#!/usr/bin/env bash
# onnxruntime 1.31.1 (CPU, onnx 1.23.2): with its optimizations on it fuses BatchNormalization into a Conv of float16
# weights and computes sqrt(var + epsilon) in float16. Where var is 0 in a channel and epsilon is below the smallest
# float16 (1e-8), that is 0 and the channel is NaN; with epsilon 1e-7 it is 8 % off. With optimizations off the same
# file gives finite values, since the operator itself computes in float32.
# Source: onnxruntime/core/optimizer/conv_bn_fusion.cc, which takes the initializers in their own type.
# Seen on 2026-11-28: "epsilon 1e-08: off 450.0, on nan", "epsilon 1e-07: off 142.4, on 130.4".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.31.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)


def largest(epsilon, level):
    """The largest value of the channel whose variance is 0."""
    arrays = {"w": random.normal(size=(2, 4, 3, 3)) * 0 + 0.25, "g": [1, 1], "b": [0, 0], "m": [0, 0], "v": [0, 1]}
    constants = [numpy_helper.from_array(np.asarray(a, np.float16), name) for name, a in arrays.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("BatchNormalization", ["y", "g", "b", "m", "v"], ["z"], epsilon=epsilon),
    ]
    x, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, c, None, None]) for n, c in (("x", 4), ("z", 2)))
    graph = helper.make_graph(nodes, "g", [x], [z], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = np.full((1, 4, 3, 3), 0.005, np.float16)
    return float(session.run(None, {"x": given})[0][0, 0].max())


for epsilon in (1e-5, 1e-7, 1e-8):
    off, on = largest(epsilon, "ORT_DISABLE_ALL"), largest(epsilon, "ORT_ENABLE_ALL")
    print(f"epsilon {epsilon:g}: off {off:.1f}, on {on:.1f}")
    assert np.isfinite(off)
    assert np.isfinite(on) == (epsilon > 1e-8)
    assert epsilon != 1e-7 or abs(on / off - 1) > 0.05
PYTHON
echo "as described"
