#!/usr/bin/env bash
# pnnx 20261020 beside torch 2.13.0 writes Python files that Python or torch refuses, of traces that are valid:
# - torch.var(x, dims, correction=0), the biased variance of batch normalization, becomes torch.var(..., unbiased=0),
#   which torch refuses, since `unbiased` takes a bool.
# - The parts of an nn.Sequential that is the whole network become attributes `self.0`, `self.1`, which are no Python.
#   Inside another module they have names, and the file is valid.
# Source: the files that pnnx.convert writes, NAME_pnnx.py.
# Seen on 2026-11-28: "TypeError: var() received an invalid combination of arguments" and "SyntaxError: invalid syntax".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pnnx==20261020 torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import pnnx
import torch
from torch import nn

warnings.simplefilter("ignore")
x = torch.rand(1, 2, 3, 3)


class Variance(nn.Module):
    def forward(self, x):
        return torch.var(x, (2, 3), correction=0, keepdim=True)


class Named(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def written(name, net):
    """The Python file that pnnx writes of a network's trace."""
    torch.jit.save(torch.jit.trace(net.eval(), x), f"{name}.pt")
    pnnx.convert(f"{name}.pt", x)
    return open(f"{name}_pnnx.py").read()


def model(text):
    names = {"__name__": "model"}
    exec(compile(text, "model", "exec"), names)
    return names["Model"]().eval()


try:
    model(written("variance", Variance()))(x)
except TypeError as error:
    print("TypeError:", str(error).splitlines()[0])
    assert "unbiased=int" in str(error)
else:
    raise SystemExit("the variance runs now")
net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
try:
    model(written("sequential", net))
except SyntaxError as error:
    print("SyntaxError:", error.text.strip()[:40])
else:
    raise SystemExit("a Sequential is valid Python now")
torch.testing.assert_close(model(written("named", Named(net)))(x), net(x))
PYTHON
echo "as described"
