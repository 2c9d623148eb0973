#!/usr/bin/env bash
# Keras 3.15.1 (backend JAX 0.10.2): save_model(..., weights_format="npz") writes an archive that Keras itself cannot
# load. Each entry of model.weights.npz is a pickled dictionary (an array of objects), and Keras reads it with
# allow_pickle=False.
# Source: keras/src/saving/saving_lib.py, class NpzIOStore: `make` fills dictionaries, `np.load(..., allow_pickle=False)`.
# Seen on 2026-11-28: "ValueError: Object arrays cannot be loaded when allow_pickle=False".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 "jax[cpu]==0.10.2"
cd "$folder"
KERAS_BACKEND=jax venv/bin/python - <<'PYTHON'
import keras
from keras.src.saving import saving_lib

model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
saving_lib.save_model(model, "h5.keras", weights_format="h5")
saving_lib.load_model("h5.keras")
saving_lib.save_model(model, "npz.keras", weights_format="npz")
try:
    saving_lib.load_model("npz.keras")
except ValueError as error:
    print("ValueError:", error)
    assert "allow_pickle=False" in str(error)
else:
    raise SystemExit("it loads now")
PYTHON
echo "as described"
