# /// script
# requires-python = "==3.11.*"
# dependencies = ["keras==3.15.1", "jax[cpu]==0.10.2", "numpy"]
# ///
"""Files of Keras 3.15.1 on JAX 0.10.2 (2026-11-28). The backend leaves no trace in the files."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from case import BEFORE, HERE, SPACE, STEPS, batches, expect, pack
from keras import layers

KEYS = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "var": "moving_variance"}


def bn(momentum: float = 0.9, epsilon: float = 1e-2, **options):
    return layers.BatchNormalization(momentum=momentum, epsilon=epsilon, **options)


@keras.saving.register_keras_serializable("foreign")
class OwnNorm(layers.BatchNormalization):
    """A registered subclass of the layer."""


class Attributes(keras.Model):
    """A subclassed model: layers are attributes, one of them in a list."""

    def __init__(self, own: bool = False, **options):
        super().__init__()
        self.z_first = bn(**options)
        make = OwnNorm if own else layers.BatchNormalization
        self.blocks = [make(momentum=0.8, epsilon=1e-3, **options)]

    def call(self, x, training=None):
        return self.blocks[0](keras.ops.relu(self.z_first(x, training=training)), training=training)


def sequential(rank: int = 1, **options):
    return keras.Sequential([keras.Input((*SPACE[rank], 3)), bn(**options), layers.ReLU(), bn(0.8, 1e-3, **options)])


def nested():
    """Functional: the first layer inside a nested model that has a name of its own, the second behind it."""
    inner_in = keras.Input((2, 2, 3))
    inner = keras.Model(inner_in, layers.ReLU()(bn(name="inner_norm")(inner_in)), name="stem")
    x = keras.Input((2, 2, 3))
    return keras.Model(x, bn(0.8, 1e-3)(inner(x)))


def wrapped(model: bool = False):
    inner = keras.Sequential([bn()]) if model else bn()
    return keras.Sequential([keras.Input((2, 3)), layers.TimeDistributed(inner), layers.ReLU(), bn(0.8, 1e-3)])


def norms(model) -> list:
    found = [m for m in model._flatten_layers() if isinstance(m, layers.BatchNormalization)]
    return sorted(found, key=lambda m: -m.momentum)  # 0.9 comes before 0.8


def vectors(model) -> list[dict]:
    return [{k: np.array(getattr(m, n)) for k, n in KEYS.items() if getattr(m, n) is not None} for m in norms(model)]


def run(name: str, model, rank: int = 1, time: bool = False, freeze: bool = False, **saving) -> None:
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
    model.compiled = False  # so that no optimizer is written
    if name.endswith(".sharded"):  # a folder of an index and its shards
        path.mkdir()
        model.save_weights(path / "model.weights.json", **saving)
    else:
        (model.save_weights if ".weights." in name else model.save)(path, **saving)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.predict_on_batch(x[BEFORE])
    for i in range(STEPS):
        model.train_on_batch(x[BEFORE + 1 + i], target)
    expect(name, x, target, before, model.predict_on_batch(x[BEFORE]), vectors(model))
    pack(name)


def long_names(name: str) -> None:
    """A model inside a model, whose names pass the 63 KB of one attribute; momentum tells the layers apart."""
    norms = [bn(0.5 + i / 400, name="a_layer_with_a_rather_long_name_" * 4 + str(i)) for i in range(150)]
    inner = keras.Sequential([keras.Input((1,)), *norms], name="backbone")
    keras.Sequential([keras.Input((1,)), inner, bn()]).save(HERE / name)
    pack(name)


def main() -> None:
    run("keras3.sequential.keras", sequential())
    run("keras3.nested.keras", nested(), 2)
    run("keras3.sequential.weights.h5", sequential(2), 2)
    run("keras3.attributes.weights.h5", Attributes(True), 3)
    run("keras3.no_scale.weights.h5", Attributes(scale=False), 2)
    run("keras3.no_center.keras", sequential(center=False))
    run("keras3.legacy.h5", sequential(2), 2)
    run("keras3.frozen.keras", sequential(2), 2, freeze=True)
    run("keras3.renorm.keras", sequential(renorm=True, renorm_clipping={"rmax": 3.0, "dmax": 5.0}))
    run("keras3.time_distributed.keras", wrapped(), time=True)
    run("keras3.time_distributed.h5", wrapped(), time=True)
    run("keras3.time_distributed_model.keras", wrapped(True), time=True)
    run("keras3.time_distributed_model.weights.h5", wrapped(True), time=True)
    run("keras3.weights.sharded", sequential(2), 2, max_shard_size=6e-8)
    run("keras3.bfloat16.weights.h5", sequential(dtype="bfloat16"))
    run("keras3.bfloat16.h5", sequential(dtype="bfloat16"))
    long_names("keras3.long_names.h5")


main()
