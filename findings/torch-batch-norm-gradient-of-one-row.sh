#!/usr/bin/env bash
# torch 2.13.0 on the CPU, nn.BatchNorm2d in training: sequences (N, L, C) seen as images of one row, (N, C, 1, L), by
# x.unsqueeze(-1).permute(0, 2, 3, 1), get gradients that are wrong by more than their own size; nothing is said. So do
# weight and bias, images of one column, BatchNorm3d, and layers in evaluation. The strides (L C, 1, 1, C) are
# contiguous as channels last, and so the output is; but they do not suggest that format. If the gradient of the output comes in
# planes, as a flatten before a linear layer sends it, the backward takes x and it for tensors of one order. The output
# is right. So is the gradient if x is made contiguous, or by x.transpose(1, 2).unsqueeze(2), whose strides suggest it.
# Source: aten/src/ATen/native/Normalization.cpp and native/cpu/batch_norm_kernel.cpp of 2.13.0 (batch_norm_backward_cpu,
# where is_contiguous without a format and suggest_memory_format choose the kernel).
# Seen (2026-11-30): "unsqueeze(-1) and permute: 143.567%; contiguous: 0.000%; unsqueeze(2): 0.000%" (of the gradient).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
sequences = torch.randn(8, 20, 3)
norm, head = nn.BatchNorm2d(3), nn.Linear(60, 5)


def gradient(see, wide=False):
    leaf = sequences.double() if wide else sequences.clone()
    leaf.requires_grad_()
    x = see(leaf)
    if wide:  # by the definition, from torch's own means and variances
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        y = (x - mean) / (var + norm.eps).sqrt()
        out = y.flatten(1) @ head.weight.double().t() + head.bias.double()
    else:
        out = head(norm(x).flatten(1))
    out.square().sum().backward()
    return out.detach().double(), leaf.grad.double()


ways = {
    "unsqueeze(-1) and permute": lambda x: x.unsqueeze(-1).permute(0, 2, 3, 1),
    "contiguous": lambda x: x.unsqueeze(-1).permute(0, 2, 3, 1).contiguous(),
    "unsqueeze(2)": lambda x: x.transpose(1, 2).unsqueeze(2),
}
errors = {}
for name, see in ways.items():
    (out, found), (true_out, true) = gradient(see), gradient(see, wide=True)
    assert torch.allclose(out, true_out, atol=1e-5), name
    errors[name] = float((found - true).norm() / true.norm())
print("; ".join(f"{name}: {error:.3%}" for name, error in errors.items()))
assert errors["unsqueeze(-1) and permute"] > 0.5
assert max(errors["contiguous"], errors["unsqueeze(2)"]) < 1e-5
PYTHON
