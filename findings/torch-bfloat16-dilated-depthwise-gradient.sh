#!/usr/bin/env bash
# torch 2.13.0 on a CPU with AVX-512: with the channels last, the gradient of the weights of a dilated depthwise
# convolution in bfloat16 is wrong without a word, and another one from call to call. Without dilation, in planes, in
# float16 or in float32 it is right; so it is with ONEDNN_MAX_CPU_ISA=AVX2. A network with such convolutions (atrous
# separable ones of segmentation) under autocast and channels_last trains on it.
# Source: oneDNN's backward by weights, through ATen/native/mkldnn/Conv.cpp (`mkldnn_convolution_backward_weights`).
# Seen on 2026-11-30 on Zen 4: the lines that are looked for at the end; errors of the first from 1 to 1e38.
# Needs a processor with AVX-512.
set -euo pipefail
grep -q avx512bw /proc/cpuinfo || { echo "needs a processor with AVX-512"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5
cd "$folder"
cat > gradient.py <<'PYTHON'
import torch
from torch import nn


def error(dtype, memory, dilation):
    """The largest of three tries, over the largest value of the gradient in float32 of the same rounded tensors."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=dilation, dilation=dilation, groups=16).to(dtype)
    wide = nn.Conv2d(16, 16, 3, padding=dilation, dilation=dilation, groups=16)
    wide.load_state_dict({name: value.float() for name, value in conv.state_dict().items()})
    x, dy = (torch.randn(6, 16, 64, 64).to(dtype).to(memory_format=memory) for _ in range(2))
    (right,) = torch.autograd.grad(wide(x.float()), [wide.weight], dy.float())
    errors = []
    for value in (1e30, -3.0, 7e5):
        filled = [torch.full((size,), value) for size in (256, 4096, 1 << 16, 1 << 20)]  # memory that others have used
        del filled
        (found,) = torch.autograd.grad(conv(x), [conv.weight], dy)
        errors.append(((found.float() - right).abs().max() / right.abs().max()).nan_to_num(1e38).item())
    return max(errors)


last, planes = torch.channels_last, torch.contiguous_format
for name, *case in (
    ("bfloat16, channels last, dilation 2", torch.bfloat16, last, 2),
    ("bfloat16, channels last, dilation 1", torch.bfloat16, last, 1),
    ("bfloat16, planes, dilation 2", torch.bfloat16, planes, 2),
    ("float32, channels last, dilation 2", torch.float32, last, 2),
):
    print(f"{name}: {'wrong' if error(*case) > 0.1 else 'right'}", flush=True)
PYTHON
"$folder/venv/bin/python" gradient.py | tee log
grep -qx 'bfloat16, channels last, dilation 2: wrong' log
grep -qx 'bfloat16, channels last, dilation 1: right' log
grep -qx 'bfloat16, planes, dilation 2: right' log
grep -qx 'float32, channels last, dilation 2: right' log
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" gradient.py > narrower
grep -qx 'bfloat16, channels last, dilation 2: right' narrower
