"""The JSON of an exported program compared with what torch.export writes for networks of plain operators.

torch turns names of the JSON into functions, its expressions into sympy's, and its guards into Python code. So each
string is matched to a grammar of its own here, and a program of the checked parts alone is made anew: descriptions
that nothing needs (stack traces, guards, module stacks) are left out.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import json
import keyword
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOST_BYTES = 1 << 28
"""The largest JSON text that is read."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}", re.ASCII)
_PATH = re.compile(r"[\w\-]+(\.[\w\-]+)*")
_WORD = re.compile(r"[A-Za-z0-9_]{0,64}", re.ASCII)
_EQUATION = re.compile(r"[A-Za-z0-9 .,>-]{0,500}", re.ASCII)
LABEL = re.compile(r"[\w .,:/@+>\-]{0,500}")
"""Strings among inputs, and names of outputs: nothing that could end a quotation in generated code."""
_DEVICE = re.compile(r"cpu|cuda|mps|xpu|meta")
_VERSION = re.compile(r"[\w.+<=\- ]{0,100}", re.ASCII)
_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,4})?", re.ASCII)
_EXPRESSION = re.compile(r"[A-Za-z0-9_(),=' .+*/%<>!&|~-]{1,20000}", re.ASCII)
_LARGEST, _DEEPEST, _MOST_POWERS = 1 << 63, 60, 4

_OPERATOR = re.compile(r"torch\.ops\.(aten|batchnorm|higher_order)\.(\w+)(?:\.(\w+))?", re.ASCII)
_HIGHER_ORDER = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
_SYMBOLIC = {
    f"{module}.{name}"
    for module, names in {
        "_operator": "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ getitem",
        "math": "trunc ceil floor sqrt",
        "torch": "sym_not sym_int sym_float sym_ite sym_max sym_min sym_sqrt _sym_sqrt",
    }.items()
    for name in names.split()
}
_TYPES = re.compile(
    r"(Optional\[|List\[)*(Tensor|int|float|bool|number|str|Device|Generator|SymInt|SymFloat|SymBool)\]*"
)
_REFUSED_OPERATORS = re.compile(
    r"from_file|set_?|to_(sparse|mkldnn)\w*|(sparse|fbgemm|mkldnn|miopen|quantized|nested)_\w*", re.ASCII
)
"""Operators that read or write files, or that take a tensor for memory of another layout without a look at it."""
_TEXTS = _words(
    "UPLO approximate assert_msg driver equation indexing interpolation mode norm ord p pad_mode padding "
    "padding_side reduce rounding_mode side"
)
"""Arguments of operators that are strings."""
_PRIVATE = _words(
    "__and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__ "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _assert_scalar _assert_tensor_metadata "
    "_batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional _cdist_forward _conj "
    "_convolution _convolution_mode _embedding_bag _embedding_bag_forward_only _euclidean_dist _fft_c2c _fft_c2r "
    "_fft_r2c _functional_assert_async _functional_assert_scalar _functional_sym_constrain_range "
    "_functional_sym_constrain_range_for_size _is_all_true _is_any_true _linalg_det _linalg_eigh _linalg_slogdet "
    "_linalg_solve_ex _linalg_svd _local_scalar_dense _log_softmax _logcumsumexp _native_batch_norm_legit "
    "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training _neg_view _pdist_forward "
    "_prelu_kernel _reshape_alias _reshape_copy _safe_softmax _scaled_dot_product_attention_math "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax _thnn_fused_gru_cell "
    "_thnn_fused_lstm_cell _to_copy _trilinear _unique2 _unsafe_index _unsafe_view _upsample_bicubic2d_aa "
    "_upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_weight_norm _weight_norm_interface"
)
"""Operators of torch with a leading underscore that programs of ordinary networks consist of."""

_FUNCTIONS = _words(
    "Symbol Integer Rational Float Add Mul Pow Max Min Mod Abs floor ceiling sign Equality Unequality Eq Ne Gt Ge "
    "Lt Le GreaterThan LessThan StrictGreaterThan StrictLessThan And Or Not Piecewise ExprCondPair Tuple FloorDiv "
    "ModularIndexing Where PythonMod CleanDiv CeilDiv CeilToInt FloorToInt PowByNatural FloatTrueDiv IntTrueDiv "
    "TruncToFloat TruncToInt RoundToInt ToFloat Identity"
)
_CONSTANTS = {"true", "false", "oo", "int_oo", "BooleanTrue", "BooleanFalse"}
_ASSUMPTIONS = {"integer", "positive", "nonnegative", "nonzero", "real", "finite", "negative"}
_CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_GUARD_CALLS = _words("max min abs int float bool round size stride storage_offset dim isnan ceil floor trunc sqrt")
_GUARD_CALLS |= {"sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite", "sym_sum", "sym_sqrt"}
_GUARD_NAMES = {"L", "math", "torch", "inf", "self"}


class NotPlainProgramError(ValueError):
    """The program has a part that plain networks do not have."""


def checked_program(text: bytes) -> bytes:
    """The JSON of an exported program, made anew of its checked parts.

    Raises:
        NotPlainProgramError: a part that is not of a plain network.
    """
    from torch._export.serde import schema

    data = _parsed(text)
    if not isinstance(data, dict) or not isinstance(module := data.get("graph_module"), dict):
        raise NotPlainProgramError("it has no graph_module")
    if module.get("treespec_namedtuple_fields"):
        raise NotPlainProgramError("its inputs or outputs are named tuples")
    _check_guards(data.get("guards_code", []))
    calls = module.get("module_call_graph")
    program = {**data, "guards_code": []}
    program["graph_module"] = {
        **module,
        "metadata": {},
        "treespec_namedtuple_fields": {},
        "module_call_graph": calls[:1] if isinstance(calls, list) else calls,
    }
    return json.dumps(_made_anew(schema.ExportedProgram, program), allow_nan=False).encode()


def checked_payloads(text: bytes) -> dict[str, Any]:
    """The table of an archive's weights or constants: name of the tensor to file, dtype, sizes and strides.

    Raises:
        NotPlainProgramError: the table has something else.
    """
    from torch._export.serde import schema

    table: dict[str, Any] = _made_anew(schema.PayloadConfig, _parsed(text))["config"]
    return table


def _parsed(text: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise NotPlainProgramError("its JSON has a key twice")
        return found

    def refuse(name: str) -> Any:
        raise NotPlainProgramError(f"its JSON has the number {name}")

    if len(text) > MOST_BYTES:
        raise NotPlainProgramError(f"its JSON has {len(text)} bytes, more than {MOST_BYTES}")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except NotPlainProgramError:
        raise
    except (ValueError, RecursionError) as error:
        raise NotPlainProgramError(f"its JSON cannot be read ({error})") from error


def _made_anew(kind: Any, data: Any) -> Any:
    try:
        return _checked(kind, data, "")
    except RecursionError as error:
        raise NotPlainProgramError("its JSON is nested too deep") from error


def _checked(kind: Any, data: Any, field: str) -> Any:
    """``data`` as the type ``kind`` of torch's schema; ``field``, "Class.field", names the rule for its strings."""
    if isinstance(kind, str):
        from torch._export.serde import schema

        kind = getattr(schema, kind)
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _checked(kind.__origin__, data, field)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (t for t in typing.get_args(kind) if t is not type(None))
        return None if data is None else _checked(inner, data, field)
    if dataclasses.is_dataclass(kind):
        return _checked_object(kind, data)
    if origin is list and isinstance(data, list):
        return [_checked(typing.get_args(kind)[0], item, field) for item in data]
    if origin is dict and isinstance(data, dict):
        rule = _KEYS.get(field)
        if rule is None and data:
            raise NotPlainProgramError(f"{field} is not empty")
        values = typing.get_args(kind)[1]
        return {_said(rule, key, field): _checked(values, value, field) for key, value in data.items()}
    return _checked_leaf(kind, data, field)


def _checked_object(kind: Any, data: Any) -> Any:
    from torch._export.serde import schema
    from torch._export.serde.union import _Union

    if not isinstance(data, dict):
        raise NotPlainProgramError(f"{kind.__name__} is no object")
    hints = typing.get_type_hints(kind, globalns=vars(schema))
    if issubclass(kind, _Union):
        if len(data) != 1 or (key := next(iter(data))) not in hints or (kind.__name__, key) in _REFUSED:
            raise NotPlainProgramError(f"{kind.__name__} is given as {', '.join(map(repr, data))}")
        return {key: _checked(hints[key], data[key], f"{kind.__name__}.{key}")}
    if kind.__name__ == "NamedArgument" and data.get("name") == "assert_msg":
        data = {**data, "arg": {"as_string": "a condition of the exported program does not hold"}}
    found = {}
    for field in dataclasses.fields(kind):
        name = f"{kind.__name__}.{field.name}"
        if field.name in data:
            given = data[field.name]
            found[field.name] = _EMPTIED[name] if name in _EMPTIED else _checked(hints[field.name], given, name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise NotPlainProgramError(f"{name} is missing")
    if kind.__name__ == "Node":
        _check_call(found)
    return found


def _checked_leaf(kind: Any, data: Any, field: str) -> Any:
    if kind is str and isinstance(data, str):
        rule = _STRINGS.get(field)
        if rule is None:
            raise NotPlainProgramError(f"{field} is no part of a plain network")
        return _said(rule, data, field)
    if kind is bool and isinstance(data, bool):
        return data
    if isinstance(kind, type) and issubclass(kind, enum.IntEnum) and type(data) is int:
        if data in [member.value for member in kind]:
            return data
    elif (kind is int and type(data) is int and abs(data) <= _LARGEST) or (
        kind is float and (type(data) in (int, float) or data in ("Infinity", "-Infinity", "NaN"))
    ):
        return data
    raise NotPlainProgramError(f"{field} is {str(data)[:80]!r}, which is none of its values")


def _said(rule: Callable[[str], str | None] | None, text: Any, field: str) -> str:
    """The text that the rule makes of a text; refused where it makes None."""
    made = rule(text) if rule is not None and isinstance(text, str) else None
    if made is None:
        raise NotPlainProgramError(
            f"{field} is {str(text)[:80]!r}, which torch.export does not write for plain networks"
        )
    return made


def _matching(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    return lambda text: text if pattern.fullmatch(text) else None


def _name(text: str) -> str | None:
    return text if _NAME.fullmatch(text) and not keyword.iskeyword(text) and not text.startswith("__") else None


def _path(text: str) -> str | None:
    """The path of a parameter or buffer: no part of it is an attribute that every module has."""
    parts = text.split(".")
    plain = _PATH.fullmatch(text) and not any(part.startswith("__") or hasattr(_MODULE, part) for part in parts)
    return text if plain and len(text) <= 1000 else None


_MODULE = nn.Module()


@functools.cache
def _operator(text: str) -> str | None:
    if text in _SYMBOLIC:
        return text
    found = _OPERATOR.fullmatch(text)
    if found is None:
        return None
    space, name, overload = found.groups()
    if space == "higher_order":
        return text if overload is None and name in _HIGHER_ORDER else None
    if space == "aten" and ((name.startswith("_") and name not in _PRIVATE) or _REFUSED_OPERATORS.fullmatch(name)):
        return None
    packet = getattr(getattr(torch.ops, space), name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload not in packet.overloads():
        return None
    schema = getattr(packet, overload)._schema
    values = [*schema.arguments, *schema.returns]
    plain = all(_TYPES.fullmatch(str(value.type)) for value in values)
    texts = all("str" not in str(a.type) or a.name in _TEXTS or space == "batchnorm" for a in schema.arguments)
    qualified = f"{space}::{name}" + ("" if overload == "default" else f".{overload}")
    return text if plain and texts and torch._C._dispatch_has_kernel(qualified) else None


def _check_call(node: dict[str, Any]) -> None:
    """Strings among a node's arguments are words, or an equation of einsum."""
    for given in node["inputs"]:
        pattern = {"equation": _EQUATION, "assert_msg": LABEL}.get(given["name"], _WORD)
        if not pattern.fullmatch(text := given["arg"].get("as_string", "")):
            raise NotPlainProgramError(f"{node['target']} is given the text {text[:80]!r}")


def _expression(text: str) -> str | None:
    """A symbolic expression over sizes, written anew from what was parsed."""
    if not _EXPRESSION.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        powers = sum(_check_expression(node) for node in _walk(tree.body))
        return ast.unparse(tree) if powers <= _MOST_POWERS else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _walk(tree: ast.expr) -> list[ast.expr]:
    found, waiting = [], [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ValueError("nested too deep")
        found.append(node)
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
                raise ValueError("a call")
            if node.func.id in ("Symbol", "Float"):
                _check_atom(node)
                continue
            if node.keywords:
                raise ValueError("an option")
            children: list[ast.expr] = node.args
        else:
            children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        waiting += [(child, depth + 1) for child in children]
    return found


def _check_atom(node: ast.Call) -> None:
    """``Symbol('s0', positive=True, ...)`` or ``Float('0.5', precision=53)``."""
    assert isinstance(node.func, ast.Name)
    pattern = _SYMBOL if node.func.id == "Symbol" else _NUMBER
    (first,) = node.args
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str) or not pattern.fullmatch(first.value):
        raise ValueError("a name")
    for option in node.keywords:
        value = option.value.value if isinstance(option.value, ast.Constant) else None
        if node.func.id == "Symbol" and option.arg in _ASSUMPTIONS and isinstance(value, bool):
            continue
        if node.func.id == "Float" and option.arg == "precision" and value == 53:
            continue
        raise ValueError("an option")


def _check_expression(node: ast.expr) -> int:
    """Whether a node is a power; any node that is neither arithmetic nor a comparison is refused."""
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        if node.func.id in ("Pow", "PowByNatural"):
            return _check_power(*node.args)
        return 0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _check_power(node.left, node.right)
    if isinstance(node, ast.Name):
        if node.id not in _CONSTANTS and not _SYMBOL.fullmatch(node.id):
            raise ValueError("a name")
    elif isinstance(node, ast.Constant):
        if not isinstance(node.value, (int, float)) or abs(node.value) > _LARGEST:
            raise ValueError("a constant")
    elif isinstance(node, ast.BinOp):
        if not isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)):
            raise ValueError("an operator")
    elif not isinstance(node, (ast.UnaryOp, ast.Compare)):
        raise ValueError("a form")
    return 0


def _check_power(base: ast.expr, exponent: ast.expr) -> int:
    while isinstance(exponent, (ast.Call, ast.UnaryOp)):
        inner = [exponent.operand] if isinstance(exponent, ast.UnaryOp) else exponent.args
        if len(inner) != 1:
            raise ValueError("an exponent")
        exponent = inner[0]
    if not isinstance(exponent, ast.Constant) or type(exponent.value) is not int or abs(exponent.value) > 8:
        raise ValueError("an exponent")
    return 1


def _tree(text: str) -> str | None:
    """The structure of inputs or outputs: tuples, lists and dicts."""
    try:
        data = _parsed(text.encode())
        version, tree = data
        return json.dumps([1, _checked_tree(tree, _DEEPEST)]) if version == 1 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _checked_tree(tree: Any, deepest: int) -> Any:
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if deepest == 0 or not isinstance(children, list) or tree.keys() != {"type", "context", "children_spec"}:
        raise ValueError("a structure")
    if kind is None:
        if context is not None or children:
            raise ValueError("a leaf")
    elif kind not in _CONTAINERS:
        raise ValueError("a container")
    elif kind in ("builtins.tuple", "builtins.list"):
        if context != "null":
            raise ValueError("a context")
    else:
        keys = _parsed(context.encode())
        if not isinstance(keys, list) or len(keys) != len(children):
            raise ValueError("keys")
        for key in keys:
            if type(key) is not int and not (isinstance(key, str) and LABEL.fullmatch(key)):
                raise ValueError("a key")
        context = json.dumps(keys)
    return {
        "type": kind,
        "context": context,
        "children_spec": [_checked_tree(child, deepest - 1) for child in children],
    }


def _check_guards(guards: Any) -> None:
    """Conditions on sizes of inputs. They are left out of what torch gets; anything else than conditions is refused."""
    if not isinstance(guards, list):
        raise NotPlainProgramError("guards_code is no list")
    for guard in guards:
        try:
            plain = isinstance(guard, str) and all(map(_is_condition, ast.walk(ast.parse(guard, mode="eval"))))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            plain = False
        if not plain:
            raise NotPlainProgramError(f"guards_code has {str(guard)[:80]!r}, which is no condition on sizes")


def _is_condition(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        return name in _GUARD_CALLS and not node.keywords
    if isinstance(node, ast.Attribute):
        return node.attr in _GUARD_CALLS
    if isinstance(node, ast.Name):
        return node.id in _GUARD_CALLS | _GUARD_NAMES
    forms = (ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Subscript, ast.Constant, ast.IfExp)
    return isinstance(node, (*forms, ast.boolop, ast.unaryop, ast.operator, ast.cmpop, ast.expr_context))


def _none(text: str) -> str | None:
    return text if not text else None


_REFUSED = {
    ("Argument", "as_custom_obj"),
    ("Argument", "as_operator"),
    ("InputSpec", "custom_obj"),
    ("InputSpec", "token"),
}
_REFUSED |= {("OutputSpec", "token")}
_EMPTIED: dict[str, Any] = {"Node.metadata": {}, "ExportedProgram.guards_code": [], "GraphModule.metadata": {}}
_KEYS: dict[str, Callable[[str], str | None]] = {
    "Graph.tensor_values": _name,
    "Graph.sym_int_values": _name,
    "Graph.sym_bool_values": _name,
    "Graph.sym_float_values": _name,
    "ExportedProgram.opset_version": _matching(_WORD),
    "ExportedProgram.range_constraints": lambda text: text if _expression(text) else None,  # looked up as it stands
    "PayloadConfig.config": _path,
}
_STRINGS: dict[str, Callable[[str], str | None]] = {
    "Device.type": _matching(_DEVICE),
    "SymExpr.expr_str": _expression,
    "SymIntArgument.as_name": _name,
    "SymFloatArgument.as_name": _name,
    "SymBoolArgument.as_name": _name,
    "TensorArgument.name": _name,
    "GraphArgument.name": _name,
    "Argument.as_string": _matching(LABEL),
    "Argument.as_strings": _matching(_WORD),
    "NamedArgument.name": lambda text: text if not text or keyword.iskeyword(text) else _name(text),
    "Node.target": _operator,
    "Node.name": _name,
    "ConstantValue.as_string": _matching(LABEL),
    "InputToConstantInputSpec.name": _name,
    "InputToParameterSpec.parameter_name": _path,
    "InputToBufferSpec.buffer_name": _path,
    "InputToTensorConstantSpec.tensor_constant_name": _path,
    "BufferMutationSpec.buffer_name": _path,
    "ParameterMutationSpec.parameter_name": _path,
    "UserInputMutationSpec.user_input_name": _name,
    "ModuleCallSignature.in_spec": _tree,
    "ModuleCallSignature.out_spec": _tree,
    "ModuleCallSignature.forward_arg_names": _name,
    "ModuleCallEntry.fqn": _none,
    "ExportedProgram.verifiers": lambda text: text if text in ("ATEN", "TRAINING") else None,
    "ExportedProgram.torch_version": _matching(_VERSION),
    "PayloadMeta.path_name": _matching(_WORD),
}
