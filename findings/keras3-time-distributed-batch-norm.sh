#!/usr/bin/env bash
# Keras 3.15.1 (backend JAX 0.10.2; the same with TensorFlow 2.21.0): TimeDistributed(BatchNormalization()) in training
# normalizes each time step by the statistics of that step alone, and updates the moving statistics once a step, so T
# times a call. Keras 2 (tf_keras 2.21.0) pools all steps of the batch and updates once. A model that was trained in one
# and goes on in the other trains differently, with no message.
# Source: keras/src/layers/rnn/time_distributed.py, `step_function` in a loop over the steps.
# Seen on 2026-11-28, of inputs (4, 2, 3) with momentum 0.9:
#   moving mean [7.647383 8.527557 9.465343]; one update of the pooled mean would be [3.9894836 4.450293 4.941774]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 "jax[cpu]==0.10.2"
KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras
import numpy as np

layer = keras.layers.BatchNormalization(momentum=0.9)
x = np.arange(24, dtype="float32").reshape(4, 2, 3) ** 1.5
y = np.asarray(keras.layers.TimeDistributed(layer)(x, training=True))
moving = np.asarray(layer.moving_mean.value)
pooled = 0.1 * x.mean((0, 1))
by_step = 0.9 * 0.1 * x[:, 0].mean(0) + 0.1 * x[:, 1].mean(0)
print("moving mean", moving, "pooled", pooled, "step by step", by_step)
np.testing.assert_allclose(moving, by_step, rtol=1e-5)
assert abs(moving - pooled).min() > 1
np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)  # each step has the mean 0 for itself
PYTHON
echo "as described"
