# /// script
# requires-python = "==3.11.*"
# dependencies = ["flax==0.12.8", "jax[cpu]==0.10.2", "orbax-checkpoint==0.12.8", "numpy"]
# ///
"""Files of Flax 0.12.8, linen and nnx, on JAX 0.10.2, and a folder of orbax 0.12.8 (2026-11-28)."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
from case import BEFORE, HERE, STEPS, batches, expect, pack
from flax import linen, nnx
from flax.training import train_state
from optax import sgd

KEYS = {"gamma": "scale", "beta": "bias"}


class Linen(linen.Module):
    dtype: jnp.dtype = jnp.float32

    @linen.compact
    def __call__(self, x, train):
        own = {"use_running_average": not train, "param_dtype": self.dtype}
        x = linen.BatchNorm(momentum=0.9, epsilon=1e-2, **own)(x)
        return linen.BatchNorm(momentum=0.8, epsilon=1e-3, **own)(linen.relu(x))


class State(train_state.TrainState):
    batch_stats: dict


def step_linen(model, variables, x, target, rate):
    def loss(params):
        y, new = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.mean((y - target) ** 2), new

    gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - rate * g, variables["params"], gradients)
    return {"params": params, **new}


def run_linen(name, rank, state=False, dtype=jnp.float32, average=False):
    x, target = batches(rank)
    model = Linen(dtype)
    variables = model.init(jax.random.key(0), x[0], True)
    for i in range(BEFORE):
        variables = step_linen(model, variables, x[i], target, 0.5)
    content = variables
    if state:
        content = State.create(
            apply_fn=model.apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=sgd(0.1)
        )
    if average:  # a moving average of the weights beside the model, which has statistics of its own
        content = {"ema": jax.tree.map(lambda v: 0.5 * v, variables), "model": variables}
    (HERE / name).write_bytes(flax.serialization.to_bytes(content))
    before = model.apply(variables, x[BEFORE], False)
    for i in range(STEPS):
        variables = step_linen(model, variables, x[BEFORE + 1 + i], target, 0.1)
    layers = []
    for key in ("BatchNorm_0", "BatchNorm_1"):
        layers.append({k: variables["params"][key][v] for k, v in KEYS.items()} | dict(variables["batch_stats"][key]))
    expect(name, x, target, before, model.apply(variables, x[BEFORE], False), layers)
    pack(name)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        first = nnx.BatchNorm(3, momentum=0.9, epsilon=1e-2, rngs=rngs)
        self.norms = nnx.List([first, nnx.BatchNorm(3, momentum=0.8, epsilon=1e-3, rngs=rngs)])

    def __call__(self, x):
        return self.norms[1](nnx.relu(self.norms[0](x)))


def step_nnx(model, x, target, rate):
    def loss(model):
        return jnp.mean((model(x) - target) ** 2)

    gradients = nnx.grad(loss)(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - rate * g, params, gradients))


def run_nnx(name, rank):
    x, target = batches(rank)
    model = Nnx()
    model.train()
    for i in range(BEFORE):
        step_nnx(model, x[i], target, 0.5)
    state = nnx.state(model)
    if name.endswith("msgpack"):
        pure = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
        (HERE / name).write_bytes(
            flax.serialization.msgpack_serialize(
                flax.traverse_util.unflatten_dict(
                    {tuple(map(str, k)): v for k, v in flax.traverse_util.flatten_dict(pure).items()}
                )
            )
        )
    else:
        checkpointer = orbax.checkpoint.StandardCheckpointer()
        checkpointer.save(HERE / name, state)
        checkpointer.wait_until_finished()
    model.eval()
    before = model(x[BEFORE])
    model.train()
    for i in range(STEPS):
        step_nnx(model, x[BEFORE + 1 + i], target, 0.1)
    model.eval()
    layers = [{"gamma": m.scale[...], "beta": m.bias[...], "mean": m.mean[...], "var": m.var[...]} for m in model.norms]
    expect(name, x, target, before, model(x[BEFORE]), layers)
    pack(name)


run_linen("flax.linen.msgpack", 2)
run_linen("flax.train_state.msgpack", 1, state=True)
run_linen("flax.average.msgpack", 1, average=True)
run_linen("flax.bfloat16.msgpack", 1, dtype=jnp.bfloat16)
run_nnx("flax.nnx.msgpack", 2)
run_nnx("flax.nnx.orbax", 1)
