# /// script
# requires-python = "==3.11.*"
# dependencies = ["equinox==0.13.8", "jax[cpu]==0.10.2", "numpy"]
# ///
"""A file of Equinox 0.13.8 on JAX 0.10.2 (2026-11-28), by `tree_serialise_leaves((model, state))`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from case import BEFORE, HERE, STEPS, batches, expect, first, pack


class Network(eqx.Module):
    first: eqx.nn.BatchNorm
    second: eqx.nn.BatchNorm

    def __init__(self, affine: bool):
        options = {"channelwise_affine": affine, "mode": "batch"}
        self.first = eqx.nn.BatchNorm(3, "batch", eps=1e-2, momentum=0.9, **options)
        self.second = eqx.nn.BatchNorm(3, "batch", eps=1e-3, momentum=0.8, **options)

    def __call__(self, x, state):
        x, state = self.first(x, state)
        return self.second(jax.nn.relu(x), state)


def apply(model, state, x):
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def step(model, state, x, target, rate):
    def loss(model):
        y, new = apply(model, state, x)
        return jnp.mean((y - target) ** 2), new

    gradients, new = eqx.filter_grad(loss, has_aux=True)(model)
    return eqx.apply_updates(model, jax.tree.map(lambda g: -rate * g, gradients)), new


def statistics(layer, state):
    t, (mean, var) = state.get(layer.batch_counter), state.get(layer.batch_state_index)
    trained = {"gamma": layer.weight, "beta": layer.bias} if layer.channelwise_affine else {}
    return trained | {"mean": mean / (1 - layer.momentum**t), "var": var / (1 - layer.momentum**t)}


def main(name: str) -> None:
    x, target = batches(2)
    xs = np.stack([first(each) for each in x])
    model, state = eqx.nn.make_with_state(Network)("no_affine" not in name)
    for i in range(BEFORE):
        model, state = step(model, state, xs[i], first(target), 0.5)
    with (HERE / name).open("wb") as file:
        if "header" in name:  # as its documentation keeps what the model is made of
            file.write(b'{"width": 3}\n')
        eqx.tree_serialise_leaves(file, (model, state))
    before = apply(eqx.nn.inference_mode(model), state, xs[BEFORE])[0]
    for i in range(STEPS):
        model, state = step(model, state, xs[BEFORE + 1 + i], first(target), 0.1)
    after = apply(eqx.nn.inference_mode(model), state, xs[BEFORE])[0]
    before, after = (np.moveaxis(np.asarray(y), 1, -1) for y in (before, after))
    expect(name, x, target, before, after, [statistics(m, state) for m in (model.first, model.second)])
    pack(name)


main("equinox.eqx")
main("equinox.header.eqx")
main("equinox.no_affine.eqx")
