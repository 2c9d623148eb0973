#!/usr/bin/env bash
# torch 2.10.0: inside every function that torch.compile traces, torch.compiler.is_exporting() is True, although nothing is
# exported: Dynamo has it in a table of functions with the constant True. Layers that take another way for export (plain
# operators in place of their own, as other runtimes know those alone) silently take it in each compiled training, too.
# The flag that the function returns, torch.compiler._is_exporting_flag, is right in both: False compiled, True exported.
# torch 2.13.0 answers False when it compiles.
# Source: torch/_dynamo/variables/torch.py (tracing_state_functions) of 2.10.0 (2026-11-29).
# Seen: "compiled: is_exporting True, flag False; exported: is_exporting True, flag True".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.10.0" "numpy==2.2.6"
"$folder/venv/bin/python" - <<'PYTHON'
import torch


class Asks(torch.nn.Module):
    def forward(self, x):
        return x + 2.0 * torch.compiler.is_exporting() + 4.0 * torch.compiler._is_exporting_flag


def said(y):
    both = int(y)
    return f"is_exporting {bool(both & 2)}, flag {bool(both & 4)}"


x = torch.zeros(())
compiled = said(torch.compile(Asks(), backend="eager", fullgraph=True)(x))
exported = said(torch.export.export(Asks(), (x,)).module()(x))
seen = f"compiled: {compiled}; exported: {exported}"
print(seen)
assert said(Asks()(x)) == "is_exporting False, flag False"
assert seen == "compiled: is_exporting True, flag False; exported: is_exporting True, flag True"
PYTHON
