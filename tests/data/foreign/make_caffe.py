# /// script
# requires-python = "==3.11.*"
# dependencies = ["caffe-ssd==0.1", "protobuf==3.20.3", "opencv-python-headless==4.14.0.94", "numpy==2.2.6"]
# ///
"""A .caffemodel written by Caffe's own message classes (caffe.proto, as the package caffe-ssd 0.1 has it compiled).

Caffe itself does not install any more. The averages are its formulas (`batch_norm_layer.cpp`) in NumPy, float32, and
the output of evaluation is that of OpenCV 4.14.0, which reads the file. Seen on 2026-11-28. OpenCV 5 reads none.
"""

import importlib.util
import os

os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"

import cv2
import numpy as np
from case import BEFORE, CHANNELS, HERE, STEPS, batches, expect, first, pack

PROTOTXT = """
input: "x"
input_shape {{ dim: 6 dim: 3 dim: 2 dim: 2 }}
layer {{ name: "bn1" type: "BatchNorm" bottom: "x" top: "bn1" batch_norm_param {{ {0} }} }}
layer {{ name: "scale1" type: "Scale" bottom: "bn1" top: "bn1" scale_param {{ bias_term: true }} }}
layer {{ name: "relu" type: "ReLU" bottom: "bn1" top: "bn1" }}
layer {{ name: "bn2" type: "BatchNorm" bottom: "bn1" top: "bn2" batch_norm_param {{ {1} }} }}
layer {{ name: "scale2" type: "Scale" bottom: "bn2" top: "bn2" scale_param {{ bias_term: true }} }}
"""
SETTINGS = ("moving_average_fraction: 0.9 eps: 0.01", "moving_average_fraction: 0.8 eps: 0.001")


def messages():
    """Caffe's message classes, without its binary."""
    folder = importlib.util.find_spec("caffe").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("caffe_pb2", f"{folder}/proto/caffe_pb2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def norm(x: np.ndarray, state: dict, decay: float, eps: float) -> np.ndarray:
    """A step of training: Caffe keeps sums and divides them by a factor that counts."""
    axes, m = tuple(range(x.ndim - 1)), x.size // CHANNELS
    mean, var = x.mean(axes), x.var(axes)
    state["mean"] = decay * state["mean"] + mean
    state["var"] = decay * state["var"] + var * m / (m - 1)
    state["factor"] = decay * state["factor"] + 1
    return (x - mean) / np.sqrt(var + eps) * state["gamma"] + state["beta"]


def model(pb, states: list[dict], text: str):
    from google.protobuf import text_format

    net = pb.NetParameter()
    text_format.Merge(text, net)
    del net.input[:], net.input_shape[:]
    blobs = {f"{kind}{i + 1}": s for i, s in enumerate(states) for kind in ("bn", "scale")}
    for layer in net.layer:
        keys = {"BatchNorm": ("mean", "var", "factor"), "Scale": ("gamma", "beta")}.get(layer.type, ())
        for key in keys:
            value = np.atleast_1d(np.float32(blobs[layer.name][key]))
            blob = layer.blobs.add()
            blob.shape.dim.extend(value.shape)
            blob.data.extend(value.tolist())
    net.name = "foreign"
    return net


def run(name: str) -> None:
    x, target = batches(2)
    random = np.random.default_rng(3)
    states = [
        {"mean": np.zeros(3), "var": np.zeros(3), "factor": 0.0}
        | {key: random.uniform(0.5, 1.5, 3) for key in ("gamma", "beta")}
        for _ in range(2)
    ]
    rules = ((0.9, 0.01), (0.8, 0.001))

    def step(batch: np.ndarray) -> None:
        hidden = np.maximum(norm(batch.astype(np.float64), states[0], *rules[0]), 0)
        norm(hidden, states[1], *rules[1])

    for i in range(BEFORE):
        step(x[i])
    text = PROTOTXT.format(*SETTINGS)
    (HERE / name).write_bytes(model(messages(), states, text).SerializeToString())
    net = cv2.dnn.readNetFromCaffe(np.frombuffer(text.encode(), np.uint8), np.fromfile(HERE / name, np.uint8))
    net.setInput(first(x[BEFORE]))
    before = np.moveaxis(net.forward(), 1, -1)
    for i in range(STEPS):
        step(x[BEFORE + 1 + i])
    layers = [{key: s[key] / s["factor"] for key in ("mean", "var")} for s in states]
    expect(name, x, target, before, before, layers)
    pack(name)


run("caffe.caffemodel")
