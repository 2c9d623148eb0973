#!/usr/bin/env bash
# Keras 3.15.1 (backend JAX 0.10.2): a model of bfloat16 is saved as .h5 without a word and cannot be loaded again. The
# .h5 gets the 16 bits as two bytes without a type (|V2) and no note of what they are; reading hands those bytes to the
# backend. A .keras archive and a .weights.h5 are right: there each array has an attribute dtype = "bfloat16". The
# numbers are not lost: they are the upper halves of float32.
# Source: keras/src/legacy/saving/legacy_h5_format.py, save_subset_weights_to_hdf5_group (`dtype=val.dtype`);
# keras/src/saving/saving_lib.py, H5Entry, which writes and reads the attribute.
# Seen on 2026-11-29: "TypeError: Error interpreting argument to stage as a JAX value. The problematic value is of type
# <class 'numpy.ndarray'>".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 "jax[cpu]==0.10.2"
cd "$folder"
KERAS_BACKEND=jax venv/bin/python - <<'PYTHON'
import h5py
import keras
import numpy as np

model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
x = np.ones((1, 3), np.float32)
expected = np.asarray(model(x)).astype(np.float32)
model.save("model.keras")
assert np.array_equal(np.asarray(keras.models.load_model("model.keras")(x)).astype(np.float32), expected)
model.save("model.h5")
with h5py.File("model.h5") as file:
    found = []
    file["model_weights"].visititems(lambda name, node: found.append(node[()]) if hasattr(node, "shape") else None)
print([array.dtype.str for array in found])
assert {array.dtype.str for array in found} == {"|V2"}
try:
    keras.models.load_model("model.h5")
except TypeError as error:
    print("TypeError:", str(error)[:120])
else:
    raise SystemExit("it loads now")
kernel = next(array for array in found if array.ndim == 2)
values = (kernel.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
assert np.array_equal(values, np.asarray(model.layers[0].kernel).astype(np.float32))
PYTHON
echo "as described"
