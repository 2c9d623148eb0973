#!/usr/bin/env bash
# torch 2.11.0: a named tuple that `_replace` made in a compiled function must not be alive where the graph breaks. Elsewhere a
# break costs a second graph; there Dynamo has no name for the tuple's class when it writes the code between the graphs, and
# torch.compile raises an AssertionError without a message (the trace ends in side_effects.py, codegen_save_tempvars:
# `assert var.mutation_type.cls_source is not None`). The same tuple made by its constructor is carried over the break.
# torch 2.13.0 takes both. So configurations kept in named tuples are best changed by their constructor in code that others
# compile, since where a graph breaks is not theirs to say.
# Source: torch/_dynamo/side_effects.py of 2.11.0 (2026-11-30).
# Seen: "2.11.0 made: [4.0, 4.0]", "2.11.0 replaced: AssertionError", "2.13.0 made: [4.0, 4.0]", "2.13.0 replaced: [4.0, 4.0]".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/tuples.py" <<'PYTHON'
from typing import NamedTuple

import torch


class Settings(NamedTuple):
    factor: float
    shift: float


def made(x):
    settings = Settings(3.0, 1.0)
    y = x * settings.factor
    torch._dynamo.graph_break()
    return y + settings.shift


def replaced(x):
    settings = Settings(2.0, 1.0)._replace(factor=3.0)
    y = x * settings.factor
    torch._dynamo.graph_break()
    return y + settings.shift


for function in (made, replaced):
    try:
        result = torch.compile(function, backend="eager")(torch.ones(2)).tolist()
    except AssertionError as error:
        result = type(error).__name__
    print(f"{torch.__version__.split('+')[0]} {function.__name__}: {result}")
PYTHON
export PIP_CONSTRAINT=/dev/null
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-cache-dir "torch==2.11.0"
"$folder/venv/bin/python" "$folder/tuples.py" | tee "$folder/seen"
rm -rf "$folder/venv"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-cache-dir "torch==2.13.0"
"$folder/venv/bin/python" "$folder/tuples.py" | tee -a "$folder/seen"
diff "$folder/seen" - <<'SEEN'
2.11.0 made: [4.0, 4.0]
2.11.0 replaced: AssertionError
2.13.0 made: [4.0, 4.0]
2.13.0 replaced: [4.0, 4.0]
SEEN
