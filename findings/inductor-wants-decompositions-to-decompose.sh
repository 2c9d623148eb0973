#!/usr/bin/env bash
# torch 2.13.0: a decomposition of a custom operator that returns NotImplemented for some inputs, to keep the operator there,
# works under AOTAutograd alone, which then leaves the operator in the graph. Inductor, whose own table it was put into, ends in
# an AssertionError "both a fallback and a decomp for same op": an operator that is in the table may not be called as it is. So
# an operator cannot be code of the compiler for small inputs and a call for large ones; the choice must be made before.
# Source: torch/fx/experimental/proxy_tensor.py (maybe_handle_decomp), torch/_inductor/lowering.py (make_fallback) of 2.13.0
# (2026-11-30).
# Seen: "small: 3.0; large under aot_eager with the table: kept; large under inductor: AssertionError: both a fallback and a
# decomp for same op: findings.twice.default".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.2.6" "setuptools<82"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import decompositions, register_decomposition

library = torch.library.Library("findings", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
torch.library.register_fake("findings::twice", lambda x: torch.empty_like(x), lib=library)
twice = torch.ops.findings.twice.default


@register_decomposition([twice])
def of_small_ones(x):
    return x + x if x.numel() < 10 else NotImplemented


def call(x):
    return twice(x) + 1


kept = []


def look(graph, _):
    kept.extend(node for node in graph.graph.nodes if node.target is twice)
    return make_boxed_func(graph.forward)


small, large = torch.ones(4), torch.ones(400)
first = float(torch.compile(call)(small)[0])
torch.compiler.reset()
torch.compile(call, backend=aot_autograd(fw_compiler=look, decompositions=decompositions))(large)
torch.compiler.reset()
try:
    torch.compile(call)(large)
    said = "no error"
except Exception as error:
    said = str(error).splitlines()[0]
seen = f"small: {first}; large under aot_eager with the table: {'kept' if kept else 'gone'}; large under inductor: {said}"
print(seen)
assert seen == (
    "small: 3.0; large under aot_eager with the table: kept; large under inductor: "
    "AssertionError: both a fallback and a decomp for same op: findings.twice.default"
)
PYTHON
