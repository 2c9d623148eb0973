#!/usr/bin/env bash
# torch 2.13.0: `at::parallel_for` in a C++ extension runs on one thread, without a word, unless the extension itself is
# compiled with OpenMP. torch's own kernels use all threads, and `at::get_num_threads()` gives the extension their number.
# The loop over threads is an OpenMP pragma in a header (under `#ifdef _OPENMP`), and `torch.utils.cpp_extension` passes
# no `-fopenmp`. With it (to compiler and linker), or through the stable ABI's `torch::stable::parallel_for`, which is a
# function of the library, the range is shared.
# Source: ATen/ParallelOpenMP.h (`invoke_parallel`), ATen/Parallel-inl.h; torch/utils/cpp_extension.py.
# Seen on 2026-11-30: "without -fopenmp: 2 threads, 1 piece" and "with -fopenmp: 2 threads, 2 pieces".
# Needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 ninja==1.13.0 setuptools==80.9.0
cd "$folder"
export TORCH_EXTENSIONS_DIR="$folder/built" PATH="$folder/venv/bin:$PATH"
cat > count.py <<'PYTHON'
import torch
from torch.utils.cpp_extension import load_inline

SOURCE = """
#include <torch/extension.h>
#include <ATen/Parallel.h>
#include <atomic>
int64_t threads() { return at::get_num_threads(); }
int64_t pieces() {
  std::atomic<int64_t> calls{0};
  at::parallel_for(0, 1000, 1, [&](int64_t, int64_t) { ++calls; });
  return calls;
}
"""
torch.set_num_threads(2)
for name, flags in (("without", []), ("with", ["-fopenmp"])):
    built = load_inline(name, SOURCE, functions=["threads", "pieces"], extra_cflags=flags, extra_ldflags=flags)
    pieces = built.pieces()
    print(f"{name} -fopenmp: {built.threads()} threads, {pieces} piece{'s' * (pieces > 1)}", flush=True)
PYTHON
python3 count.py | tee log
grep -qx 'without -fopenmp: 2 threads, 1 piece' log
grep -qx 'with -fopenmp: 2 threads, 2 pieces' log
echo "as described"
