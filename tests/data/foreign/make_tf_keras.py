# /// script
# requires-python = "==3.11.*"
# dependencies = ["tf_keras==2.21.0", "tensorflow-cpu==2.21.0", "numpy"]
# ///
"""Files of tf_keras 2.21.0 (Keras 2) on TensorFlow 2.21.0 (2026-11-28)."""

import numpy as np
import tf_keras as keras
from case import BEFORE, HERE, SPACE, STEPS, batches, expect, pack
from tf_keras import layers

KEYS = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "var": "moving_variance"}


def bn(momentum: float = 0.9, epsilon: float = 1e-2, kind=layers.BatchNormalization, **options):
    return kind(momentum=momentum, epsilon=epsilon, **options)


class Attributes(keras.Model):
    """A subclassed model: layers are attributes."""

    def __init__(self, **options):
        super().__init__()
        self.first = bn(**options)
        self.second = bn(0.8, 1e-3, **options)

    def call(self, x, training=None):
        return self.second(keras.backend.relu(self.first(x, training=training)), training=training)


def sequential(rank: int = 1, kind=layers.BatchNormalization, **options):
    first, second = (bn(*settings, kind, **options) for settings in ((0.9, 1e-2), (0.8, 1e-3)))
    return keras.Sequential([keras.Input((*SPACE[rank], 3)), first, layers.ReLU(), second])


def nested():
    inner_in = keras.Input((2, 2, 3))
    inner = keras.Model(inner_in, layers.ReLU()(bn(name="inner_norm")(inner_in)), name="stem")
    x = keras.Input((2, 2, 3))
    return keras.Model(x, bn(0.8, 1e-3)(inner(x)))


def equal_names():
    """Two models inside a model, each with a layer of the same name and settings of its own."""

    def inner(name: str, *settings: float):
        x = keras.Input((2, 2, 3))
        return keras.Model(x, bn(*settings, name="norm")(x), name=name)

    x = keras.Input((2, 2, 3))
    y = layers.ReLU()(inner("stem", 0.9, 1e-2)(x))
    return keras.Model(x, inner("head", 0.8, 1e-3)(y))


def wrapped():
    return keras.Sequential([keras.Input((2, 3)), layers.TimeDistributed(bn()), layers.ReLU(), bn(0.8, 1e-3)])


def norms(model) -> list:
    found = [m for m in model._flatten_layers() if hasattr(m, "moving_variance")]
    return sorted(found, key=lambda m: -m.momentum)  # 0.9 comes before 0.8


def vectors(model) -> list[dict]:
    return [{k: getattr(m, n).numpy() for k, n in KEYS.items() if getattr(m, n) is not None} for m in norms(model)]


def run(name: str, model, rank: int = 1, time: bool = False, freeze: bool = False, weights: bool = False) -> None:
    x, target = batches(rank)
    if time:  # (N, time, C) of the same size
        x, target = (np.repeat(a[..., None, :], 2, -2) * np.float32([[1], [0.5]]) for a in (x, target))
    model.compile(keras.optimizers.SGD(0.5), "mse")
    for i in range(BEFORE):
        model.train_on_batch(x[i], target)
    if freeze:
        norms(model)[0].trainable = False
    model.compile(keras.optimizers.SGD(0.1), "mse")
    path = HERE / name
    if weights or ".weights." in name:
        model.save_weights(path)
    else:
        options = {} if name.endswith(".keras") else {"include_optimizer": False}
        model.save(path, **options)
    before = model.predict_on_batch(x[BEFORE])
    for i in range(STEPS):
        model.train_on_batch(x[BEFORE + 1 + i], target)
    expect(name, x, target, before, model.predict_on_batch(x[BEFORE]), vectors(model))
    pack(name)


run("keras2.flat.h5", sequential())
run("keras2.fused.h5", sequential(2), 2)
run("keras2.fused3d.weights.h5", sequential(3), 3)
run("keras2.nested.h5", nested(), 2)
run("keras2.plain.keras", sequential(2, fused=False), 2)
run("keras2.fused.keras", sequential(2), 2)
run("keras2.by_name.h5", sequential(2), 2, weights=True)
run("keras2.attributes.weights.h5", Attributes(), 2)
run("keras2.no_scale.h5", sequential(2, scale=False), 2)
run("keras2.frozen.h5", sequential(2), 2, freeze=True)
run("keras2.renorm.h5", sequential(renorm=True, renorm_clipping={"rmax": 3.0, "dmax": 5.0}))
run("keras2.virtual.h5", sequential(2, virtual_batch_size=3), 2)
run("keras2.time_distributed.h5", wrapped(), time=True)
run("keras2.virtual.weights.h5", sequential(2, virtual_batch_size=3), 2)
run("keras2.sync_layer.h5", sequential(2, layers.experimental.SyncBatchNormalization), 2)
run("keras2.synchronized.h5", sequential(2, synchronized=True), 2)
run("keras2.equal_names.h5", equal_names(), 2)
