#!/usr/bin/env bash
# torch 2.13.0, nn.TransformerEncoderLayer: whoever puts batch normalization into norm1 and norm2 trains with it, and is
# served layer normalization. In evaluation and without gradients the layer reads only weight, bias and eps of both and
# calls a fused kernel that normalizes every position over its features. No class is checked and nothing is said; running
# statistics are not read at all. With gradients enabled evaluation is right, so a test that forgets no_grad passes.
# A forward hook on either norm keeps the layer from the fused kernel.
# Source: torch/nn/modules/transformer.py of 2.13.0 (TransformerEncoderLayer.forward, why_not_sparsity_fast_path).
# Seen (2026-11-29): "with gradients: batch norm; without: layer norm; without, and a hook: batch norm".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn


class OverSequences(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def encoder(norm):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.norm1, layer.norm2 = norm(8), norm(8)
    return layer


x = torch.randn(3, 7, 8) * 2 + 3
batch, by_layer = encoder(OverSequences), encoder(nn.LayerNorm)
for _ in range(30):
    batch(x)  # running statistics come near those of the batch
batch.eval(), by_layer.eval()
right = batch(x).detach()


def which(y):
    with torch.no_grad():
        other = by_layer(x)
    names = {"batch norm": right, "layer norm": other}
    near = [name for name, z in names.items() if torch.allclose(y, z, atol=1e-5)]
    assert len(near) == 1, near
    return near[0]


found = [which(batch(x).detach())]
with torch.no_grad():
    found.append(which(batch(x)))
    batch.norm1.register_forward_hook(lambda *_: None)
    found.append(which(batch(x)))
print(f"with gradients: {found[0]}; without: {found[1]}; without, and a hook: {found[2]}")
assert found == ["batch norm", "layer norm", "batch norm"]
PYTHON
