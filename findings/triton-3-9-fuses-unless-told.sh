#!/usr/bin/env bash
# Triton 3.9.0 (torch 2.15 installs it) warns once a process, when a kernel is compiled whose launch does not say
# enable_fp_fusion. It fuses products and sums as ever, but "the default will change to DISABLED in Triton 3.10". The option
# decides the bits: without fusion the same kernel has a product and a sum, each rounded, in place of one fma. So by that
# warning a kernel that leaves it open will give other results under the next minor version. If warnings are errors, as in
# many test suites, it does not compile under this one. Triton 3.8.0 fuses by default, and says nothing.
# Source: triton/knobs.py (fp_fusion_enabled) and triton/_utils.py (FP_FUSION_DEFAULT_WARNING) of 3.9.0 (2026-11-29).
# Seen: "3.8.0 open: fma, no warning", "3.9.0 open: fma, warns of 3.10", "3.9.0 True: fma, no warning",
#       "3.9.0 False: mul and add, no warning".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernel.py" <<'PYTHON'
import warnings

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def scale_and_shift(x, y, a: tl.constexpr):
    i = tl.arange(0, 128)
    v = tl.load(x + i)
    tl.store(y + i, v * tl.load(x + i + 128) + a)


def seen(name, options):
    source = ASTSource(scale_and_shift, {"x": "*fp32", "y": "*fp32", "a": "constexpr"}, {(2,): 0.3})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
    told = [str(each.message) for each in told if "FP_FUSION" in str(each.message)]
    assert all("DISABLED in Triton 3.10" in each for each in told)
    made = "fma" if "fma.rn.f32" in ptx else "mul and add" if "mul" in ptx and "add" in ptx else "neither"
    return f"{triton.__version__} {name}: {made}, {'warns of 3.10' if told else 'no warning'}"


for name, options in {"open": {}, "True": {"enable_fp_fusion": True}, "False": {"enable_fp_fusion": False}}.items():
    print(seen(name, options))
PYTHON
export TRITON_CACHE_DIR="$folder/cache"
unset TRITON_DEFAULT_FP_FUSION
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "triton==3.8.0"
"$folder/venv/bin/python" "$folder/kernel.py" | tee "$folder/seen"
"$folder/venv/bin/pip" install --quiet "triton==3.9.0"
"$folder/venv/bin/python" "$folder/kernel.py" | tee -a "$folder/seen"
diff "$folder/seen" - <<'SEEN'
3.8.0 open: fma, no warning
3.8.0 True: fma, no warning
3.8.0 False: mul and add, no warning
3.9.0 open: fma, warns of 3.10
3.9.0 True: fma, no warning
3.9.0 False: mul and add, no warning
SEEN
