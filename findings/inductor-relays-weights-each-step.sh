#!/usr/bin/env bash
# torch 2.13.0, torch.compile of a network of convolutions in training on a CPU: Inductor lays every convolution out channels
# last, so each step copies every weight into that order before its forward, although parameters never change
# theirs. A custom operator between the convolutions, which has no tag, is handed its input in the order of eager mode, so
# each of its calls is wrapped in transpositions, too; the tag flexible_layout takes them away, and the option
# layout_optimization=False both.
# Source: decide_layout_opt in torch/_inductor/graph.py of 2.13.0, torch.Tag (2026-11-29).
# Seen: "weights copied in a step: 3 of 3; operator gets (planar): True; with flexible_layout: False; without layout
# optimization: 0 of 3".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6" "setuptools==80.9.0"
"$folder/venv/bin/python" - <<'PYTHON'
import re

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

library = torch.library.Library("given", "DEF")
for name, tags in (("plain", ()), ("flexible", (torch.Tag.flexible_layout,))):
    library.define(f"{name}(Tensor x) -> Tensor", tags=tags)
    library.impl(name, lambda x: torch.empty_like(x).copy_(x), "CPU")
    torch.library.register_fake(f"given::{name}", torch.empty_like, lib=library)
    torch.library.register_autograd(f"given::{name}", lambda ctx, dy: dy * 1, lib=library)


class Net(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.operator = operator

    def forward(self, x):
        for convolution in self.convolutions:
            x = self.operator(convolution(x))
        return x


def code(operator, options=None):
    torch.compiler.reset()
    net, x = torch.compile(Net(operator), options=options), torch.randn(2, 8, 6, 6)

    def step():
        net(x).square().mean().backward()

    _, sources = run_and_get_code(step)
    forward = sources[0]
    copied = len(re.findall(r"empty_strided_cpu\(\(8, 8, 3, 3\), \(72, 1, 24, 8\)", forward))
    claims = re.findall(r"assert_size_stride\(\w+, \(2, 8, 6, 6\), \((\d+), (\d+), .*?'torch.ops.given", forward)
    return copied, {int(channels) for _, channels in claims} == {36}


copied, planar = code(torch.ops.given.plain)
_, still = code(torch.ops.given.flexible)
without, _ = code(torch.ops.given.flexible, {"layout_optimization": False})
print(
    f"weights copied in a step: {copied} of 3; operator gets (planar): {planar}; with flexible_layout: {still}; "
    f"without layout optimization: {without} of 3"
)
assert (copied, planar, still, without) == (3, True, False, 0)
PYTHON
