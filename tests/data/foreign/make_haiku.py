# /// script
# requires-python = "==3.11.*"
# dependencies = ["dm-haiku==0.0.17", "jax[cpu]==0.10.2", "flax==0.12.8", "numpy"]
# ///
"""Haiku 0.0.17 on JAX 0.10.2 (2026-11-28): parameters and state in an .npz by their paths, in a pickle, in msgpack."""

import pickle

import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from case import BEFORE, HERE, STEPS, batches, expect, pack


def network(x, train):
    x = hk.BatchNorm(True, True, 0.9, eps=1e-2, name="first")(x, train)
    return hk.BatchNorm(True, True, 0.8, eps=1e-3, name="second")(jax.nn.relu(x), train)


def step(model, params, state, x, target, rate):
    def loss(params):
        y, new = model.apply(params, state, None, x, True)
        return jnp.mean((y - target) ** 2), new

    gradients, new = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - rate * g, params, gradients), new


def main(name: str) -> None:
    x, target = batches(2)
    model = hk.transform_with_state(network)
    params, state = model.init(jax.random.key(0), x[0], True)
    for i in range(BEFORE):
        params, state = step(model, params, state, x[i], target, 0.5)
    arrays = {
        f"{kind}/{path}/{key}": np.asarray(value)
        for kind, tree in (("params", params), ("state", state))
        for path, entries in tree.items()
        for key, value in entries.items()
    }
    if name.endswith(".npz"):
        np.savez(HERE / name, **arrays)
    elif name.endswith(".pkl"):  # as many people keep the pair
        with (HERE / name).open("wb") as file:
            pickle.dump(jax.tree.map(np.asarray, (params, state)), file)
    else:
        tree = jax.tree.map(np.asarray, {"params": params, "state": state})
        (HERE / name).write_bytes(flax.serialization.msgpack_serialize(tree))
    before = model.apply(params, state, None, x[BEFORE], False)[0]
    for i in range(STEPS):
        params, state = step(model, params, state, x[BEFORE + 1 + i], target, 0.1)
    layers = [
        {
            "gamma": params[n]["scale"],
            "beta": params[n]["offset"],
            "mean": state[f"{n}/~/mean_ema"]["average"],
            "var": state[f"{n}/~/var_ema"]["average"],
        }
        for n in ("first", "second")
    ]
    expect(name, x, target, before, model.apply(params, state, None, x[BEFORE], False)[0], layers)
    pack(name)


main("haiku.npz")
main("haiku.pkl")
main("haiku.msgpack")
