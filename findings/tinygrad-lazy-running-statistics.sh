#!/usr/bin/env bash
# tinygrad 0.14.0 (DEV=CPU, which needs clang on the path): the running statistics of nn.BatchNorm are lazy. Where they
# are not realized before optimizer.step(), they are computed later from the *new* weights of the layers before: the
# statistics of a batch that never was normalized so. Realizing loss, running_mean and running_var before the step
# gives what torch gives.
# Source: tinygrad/nn/__init__.py, BatchNorm.__call__: `self.running_mean.assign(...)` without realize.
# Seen on 2026-11-28: running mean [0.17 0.18 0.18] realized before the step, [0.03 -0.01 0.04] after it.
set -euo pipefail
command -v clang >/dev/null || { echo "needs clang" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tinygrad==0.14.0 numpy
DEV=CPU "$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from tinygrad import Context, Tensor, nn

x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32") * 2 + 1


def train(realize):
    norm, w = nn.BatchNorm(3), Tensor(np.ones((1, 3), "float32"))
    optimizer = nn.optim.SGD([w], lr=0.5)
    with Context(TRAINING=1):
        optimizer.zero_grad()
        y = norm(Tensor(x) * w + w * w)
        loss = (y * Tensor(x**2) + w).square().mean()
        loss.backward()
        if realize:
            Tensor.realize(loss, norm.running_mean, norm.running_var)
        optimizer.step()
    return norm.running_mean.numpy(), w.numpy()


(before, w), (after, same) = train(True), train(False)
print("realized before the step", before, "after it", after)
np.testing.assert_allclose(before, 0.1 * (x + 1).mean(0), rtol=1e-5)  # of the weights that the batch met
np.testing.assert_allclose(after, 0.1 * (x * w + w * w).mean(0), rtol=1e-4)  # of the weights after the step
np.testing.assert_array_equal(w, same)
PYTHON
echo "as described"
