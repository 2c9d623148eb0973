"""The operators' arguments: the C++ structs name what the schemas name, in the same order and of the same types."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import batchnorm.functional  # noqa: F401  (defines the operators)
from batchnorm.ops.schemas import ARGUMENTS, by_name

HEADER = Path(__file__).parents[2] / "csrc" / "torch" / "operators.h"
TYPES = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "OptionalTensor",
    "int": "int64_t",
    "float": "double",
    "bool": "bool",
    "Optional[float]": "std::optional<double>",
}


def structs() -> dict[str, list[tuple[str, str]]]:
    """Members of each `...Arguments` of the header, as (name, type), by the operator's name."""
    found = {}
    for name, body in re.findall(r"struct (\w+)Arguments \{(.*?)\};", HEADER.read_text(), re.DOTALL):
        operator = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        found[operator] = [
            (member, kind)
            for kind, members in re.findall(r"^\s*(\S+) ([^;]+);", body, re.MULTILINE)
            for member in re.split(r",\s*", members)
        ]
    return found


@pytest.mark.parametrize("operator", sorted(structs()))
def test_structs_have_the_members_of_the_schema(operator: str):
    schema = getattr(torch.ops.batchnorm, operator).default._schema
    assert structs()[operator] == [(each.name, TYPES[str(each.type)]) for each in schema.arguments]


def test_every_operator_of_the_cpu_has_a_struct():
    registered = {
        name for name in ARGUMENTS if torch._C._dispatch_has_kernel_for_dispatch_key(f"batchnorm::{name}", "CPU")
    }
    assert registered == set(structs()) or not registered  # none where the native library was not built


def test_implementations_get_arguments_by_name():
    got = []
    call = by_name("moments", got.append)
    call(1, 2)
    call(1, pool_size=3, mask=4)
    assert [(a.x, a.pool_size, a.mask) for a in got] == [(1, 2, None), (1, 3, 4)]
    with pytest.raises(TypeError, match="pool_size"):
        call(1)


def test_named_tuples_have_the_defaults_of_the_schema():
    for name, arguments in ARGUMENTS.items():
        schema = getattr(torch.ops.batchnorm, name).default._schema
        assert list(arguments._fields) == [each.name for each in schema.arguments]
        optional = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
        assert arguments._field_defaults == optional, name
