"""For the reference pages: docstrings that are made of a template, `__doc__ = _DOC.format(name=...)`.

The pages are read out of the sources without importing them, so the template and its values are read there, too.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Gives each class that has such a docstring its text."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, **rest: Any) -> None:
        for statement in getattr(node, "body", ()):
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__doc__":
                text = formatted(Path(str(cls.filepath)).read_text(encoding="utf-8"), statement.value)
                cls.docstring = griffe.Docstring(text, lineno=statement.lineno, parent=cls, parser=None)


def formatted(source: str, call: ast.expr) -> str:
    """The text of `NAME.format(...)`, NAME being a string of the module."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        raise ValueError(f"docstrings: {ast.unparse(call)} is no template with values")
    names: dict[str, Any] = {}
    for item in ast.parse(source).body:
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant | ast.JoinedStr):
            names[ast.unparse(item.targets[0])] = _value(item.value, names)
    template: str = names[ast.unparse(call.func.value)]
    # Values are constants and f-strings of constants, of this package's own sources.
    values = {word.arg: _value(word.value, names) for word in call.keywords if word.arg}
    return inspect.cleandoc(template.format(**values))


def _value(expression: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(expression), "docstring", "eval"), {"__builtins__": {}}, names)
