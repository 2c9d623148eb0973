#!/usr/bin/env bash
# torch 2.13.0, torch.compile: `x.layout` may be read in the forward of an autograd.Function, and not in its backward, where
# Dynamo counts it among "strict mode banned ops". So does everything that reads it, as suggest_memory_format does for tensors
# of four dimensions: with fullgraph=True the error is raised, else the graph breaks at each call of the function without
# a word, in training alone. `x.is_contiguous(memory_format=...)` and `x.stride()` are let through.
# Source: torch/_dynamo/config.py (_autograd_backward_strict_mode_banned_ops) of 2.13.0 (2026-11-29).
# Seen: "forward: traced; backward: Unsupported, strict mode banned op; strides instead: traced".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def squares(in_forward, in_backward):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            in_forward(x)
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            in_backward(x)
            return 2 * x * dy

    return Square.apply


def said(function):
    torch.compiler.reset()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    try:
        torch.compile(function, fullgraph=True, backend="aot_eager")(x).sum().backward()
    except torch._dynamo.exc.Unsupported as error:
        return f"Unsupported, {'strict mode banned op' if 'Strict mode banned op' in str(error) else error}"
    torch.testing.assert_close(x.grad, 2 * x)
    return "traced"


layout = lambda x: x.layout == torch.strided
strides = lambda x: (x.is_contiguous(memory_format=torch.channels_last), x.stride())
nothing = lambda x: None
found = [said(squares(layout, nothing)), said(squares(nothing, layout)), said(squares(nothing, strides))]
print(f"forward: {found[0]}; backward: {found[1]}; strides instead: {found[2]}")
assert found == ["traced", "Unsupported, strict mode banned op", "traced"]
PYTHON
