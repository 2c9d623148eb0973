#!/usr/bin/env bash
# Triton 3.6.0: a scalar argument that a kernel annotates with tl.float64 is an f64 in compiled code, also under another
# name (`share = momentum`). Under TRITON_INTERPRET=1 the argument itself is exact, but an assignment to a name makes the
# nearest float32 of it. So a kernel that mixes float64 running statistics by such a share of 0.1 is 1.5e-8 off when it is
# tested on the CPU, and exact to float64 on a GPU. Shares that float32 holds (0.125, 0.5) agree. Run beside torch 2.13.0.
# Source: python/triton/runtime/interpreter.py, `ASTTransformer.visit_Assign` (wraps the value in `to_tensor`), and
# python/triton/language/semantic.py, `to_tensor` (a Python float within float32's range becomes fp32).
# Seen on 2026-11-28: "interpreted 0.1 as 0.1, assigned 0.10000000149011612", "compiled: f64 alone".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 triton==3.6.0 numpy
cd "$folder"
cat > kernel.py <<'PYTHON'
import os

import torch
import triton
import triton.language as tl


@triton.jit
def mix(out, batch, momentum: tl.float64):
    channel = tl.arange(0, 4)
    share = momentum
    tl.store(out + channel, momentum * tl.load(batch + channel))
    tl.store(out + 4 + channel, share * tl.load(batch + channel))


if os.environ.get("TRITON_INTERPRET") == "1":
    for momentum in (0.1, 0.125):
        out, batch = torch.zeros(8, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        mix[(1,)](out, batch, momentum)
        itself, assigned = out[0].item(), out[4].item()
        print(f"interpreted {momentum} as {itself}, assigned {assigned}")
        assert itself == momentum
        assert (assigned == momentum) == (momentum == 0.125), "an assigned 0.1 is exact now"
else:
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(mix, {"out": "*fp64", "batch": "*fp64", "momentum": "fp64"}, {})
    text = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"]
    assert "%momentum: f64" in text, text
    assert "f32" not in text, text
    print("compiled: f64 alone")
PYTHON
TRITON_INTERPRET=1 venv/bin/python kernel.py
venv/bin/python kernel.py
echo "as described"
