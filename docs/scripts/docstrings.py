"""For the reference pages: docstrings that are made of a template, `__doc__ = _DOC.format(name=...)`, and defaults that
are a private constant, `momentum=_MOMENTUM`, or lie in a private call, `steps = _setting(3, _COUNT)`, as the values
that they stand for.

The pages are read out of the sources without importing them, so the template and its values are read there, too.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Gives each class that has such a docstring its text, and each argument its default as a value."""

    def on_function(self, *, func: griffe.Function, **rest: Any) -> None:
        for parameter in func.parameters:
            if re.fullmatch("_[A-Z_]+", str(parameter.default)):
                value = constant(Path(str(func.filepath)).read_text(encoding="utf-8"), str(parameter.default))
                parameter.default = value or parameter.default

    def on_attribute_instance(self, *, attr: griffe.Attribute, **rest: Any) -> None:
        default = attr.value  # of _setting(3, _CHECK), a field's default and its rule, the default alone
        if isinstance(default, griffe.ExprCall) and re.fullmatch(r"_[a-z_]+", str(default.function)):
            attr.value = value_in(Path(str(attr.filepath)).read_text(encoding="utf-8"), str(default.arguments[0]))
        annotation = attr.annotation  # of Annotated[int, _CHECK] the type alone
        if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left).endswith("Annotated"):
            attr.annotation = next(iter(annotation.slice.elements))

    def on_class_members(self, *, node: Any, cls: griffe.Class, **rest: Any) -> None:
        for statement in getattr(node, "body", ()):
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__doc__":
                text = formatted(Path(str(cls.filepath)).read_text(encoding="utf-8"), statement.value)
                cls.docstring = griffe.Docstring(text, lineno=statement.lineno, parent=cls, parser=None)


def constant(source: str, name: str) -> str | None:
    """What a module's constant is in its source; of `_Default(0.1)`, which tells a default from a value given, 0.1."""
    for item in ast.parse(source).body:
        targets = item.targets if isinstance(item, ast.Assign) else ()
        if any(ast.unparse(target) == name for target in targets):
            value = item.value
            return ast.unparse(value.args[0] if isinstance(value, ast.Call) and value.args else value)
    return None


def value_in(source: str, default: str) -> str:
    """A default as its value, where it is a constant of the module."""
    return (constant(source, default) if default.isidentifier() else None) or default


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
