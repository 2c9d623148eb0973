# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "tensorflow-cpu==2.21.0", "keras==3.15.1", "tf_keras==2.21.0", "tf2onnx==1.17.0", "onnx==1.23.2", "numpy"
# ]
# ///
"""ONNX files that Keras 3.15.1 (its own export) and tf2onnx 1.17.0 (of tf_keras 2.21.0) wrote on 2026-11-28.

Neither writes BatchNormalization for inference behind a layer: tf2onnx folds some, and spells the rest as Mul and Add.
"""

import gzip
import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tf2onnx
import tf_keras
from case import HERE


def images(k):
    """Normalization before a convolution, behind one, behind an activation, and behind a dense layer."""
    layers = k.layers
    return k.Sequential(
        [
            k.Input((6, 6, 3)),
            layers.BatchNormalization(),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
            layers.BatchNormalization(),
        ]
    )


def sequences(k):
    layers = k.layers
    return k.Sequential(
        [
            k.Input((8, 3)),
            layers.Conv1D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(5),
            layers.BatchNormalization(),
        ]
    )


def lively(model):
    random = np.random.default_rng(0)
    model(np.zeros((1, *model.input_shape[1:]), np.float32))  # a model that was never called is not exported
    for layer in model.layers:
        if "BatchNormalization" in type(layer).__name__:
            gamma, beta, mean, var = layer.get_weights()
            layer.set_weights(
                [
                    random.uniform(0.5, 2, gamma.shape),
                    random.normal(size=beta.shape),
                    random.normal(size=mean.shape),
                    random.uniform(0.5, 2, var.shape),
                ]
            )
    return model


def pack(name: str) -> None:
    content = (HERE / name).read_bytes()
    (HERE / name).unlink()
    (HERE / f"{name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))


for make in (images, sequences):
    lively(make(keras)).export(HERE / f"keras3.{make.__name__}.onnx", format="onnx", verbose=False)
    pack(f"keras3.{make.__name__}.onnx")
    tf2onnx.convert.from_keras(lively(make(tf_keras)), output_path=str(HERE / f"tf2onnx.{make.__name__}.onnx"))
    pack(f"tf2onnx.{make.__name__}.onnx")
