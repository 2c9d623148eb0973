#!/usr/bin/env bash
# Equinox 0.13.8, eqx.nn.BatchNorm(mode="batch", momentum=d): the running variance starts from 1, and inference divides
# it by 1 - d^t, which is right for an average that starts from 0. So inference uses var + d^t/(1 - d^t): after one batch
# of variance 9 with d = 0.9 it is 18, not 9, and outputs are 1/sqrt(2) of those of training. The mean starts from 0 and
# is right. After 100 batches with d = 0.99 the variance is still 0.58 too large.
# Source: equinox/nn/_batch_norm.py of 0.13.8 (2026-11-28). Seen: "inference after one batch: variance 18.000".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "equinox==0.13.8" "jax[cpu]==0.10.2" "numpy==2.4.6"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import equinox as eqx
import jax
import numpy as np

layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", eps=0.0, momentum=0.9, mode="batch")
x = np.float32([[-3.0], [3.0], [-3.0], [3.0]])  # mean 0, variance 9


def run(layer, state):
    return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


trained, state = run(layer, state)
inferred, _ = run(eqx.nn.inference_mode(layer), state)
variance = float((x[1] / inferred[1])[0]) ** 2
print(f"training: {float(trained[1][0]):.4f}; inference after one batch: variance {variance:.3f}, the batch's is 9")
assert abs(float(trained[1][0]) - 1) < 1e-3
assert abs(variance - 18) < 0.05
PYTHON
