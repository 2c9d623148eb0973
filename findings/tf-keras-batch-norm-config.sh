#!/usr/bin/env bash
# tf_keras 2.21.0 (Keras 2) with TensorFlow 2.21.0: BatchNormalization.get_config() holds neither `fused` nor
# `synchronized`, so a saved model trains differently after it is loaded. Both options make the moving variance the
# *biased* one; the layer that is built from the file falls back to the fused kernel for images, which keeps the
# *unbiased* one. After one batch of the values 1 and 3 with momentum 0.9 (biased variance 1, unbiased 2) the layer
# with fused=False holds 0.9 + 0.1 = 1.0, the same layer after from_config(get_config()) 0.9 + 0.2 = 1.1.
# Source: tf_keras/src/layers/normalization/batch_normalization.py, `get_config` and `build`.
# Seen on 2026-11-28: "fused=False: made 1.0, from its config 1.1", and the same for synchronized=True.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tf_keras==2.21.0 tensorflow-cpu==2.21.0
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from tf_keras import layers

x = np.float32([1, 3]).reshape(2, 1, 1, 1)


def after_a_step(layer):
    layer(x, training=True)
    return float(layer.moving_variance.numpy()[0])


for option in ({"fused": False}, {"synchronized": True}):
    layer = layers.BatchNormalization(momentum=0.9, **option)
    again = layers.BatchNormalization.from_config(layer.get_config())
    name, value = next(iter(option.items()))
    assert name not in layer.get_config()
    made, loaded = after_a_step(layer), after_a_step(again)
    print(f"{name}={value}: made {made:.1f}, from its config {loaded:.1f}")
    assert abs(made - 1.0) < 1e-6
    assert abs(loaded - 1.1) < 1e-6
PYTHON
echo "as described"
