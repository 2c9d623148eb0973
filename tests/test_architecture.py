"""DESIGN.md's walls: imports run one way, and `import batchnorm` stays light."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "batchnorm"

# As DESIGN.md has it; `test_the_design_says_the_same` keeps the two together.
ARROW = (
    "{cli, integrations} > report > {lab, diagnosis, training} > surgery > population > nn > functional > sources > "
    "running > batch > ops > kernels"
)
LEVELS = {part: level for level, group in enumerate(reversed(ARROW.split(" > "))) for part in re.findall(r"\w+", group)}
BASE = {
    "errors": set(),
    "installation": {"errors"},
    "undo": set(),
    "moments": {"errors"},
    "exchanges": {"errors"},
    "pools": {"errors", "exchanges", "moments"},
    "progress": set(),
    "data": {"errors", "moments"},
    "writing": {"errors"},
    "memory": {"errors", "writing"},
}  # below everyone, and what they may know
TYPES_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
HEAVY = {"jinja2", "matplotlib", "mlxtend", "onnx", "onnxruntime", "onnxscript", "pandas", "rich"}
HEAVY |= {"lightning", "pytorch_lightning", "tensorboard", "transformers"}
HEAVY |= {"dask", "polars", "pyarrow", "pyspark", "ray", "scipy", "sklearn", "triton", "typer"}


def may_import(importer: str, imported: str) -> bool:
    """Whether DESIGN.md lets part `importer` know part `imported`."""
    if importer == imported:
        return True
    if importer in BASE:
        return imported in BASE[importer]
    if imported in BASE:
        return True
    if importer == "reference":
        return False
    if imported == "reference":
        return importer == "lab"
    if (importer, imported) == ("lab", "training"):
        return True
    return LEVELS[importer] > LEVELS[imported]


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Full dotted names that a module of `package` imports anywhere, but for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in TYPES_ONLY:
            for branch in node.orelse:
                yield from imported_names(ast.Module([branch], []), package)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = [*parents, node.module] if node.level else [node.module]
            source = ".".join(filter(None, origin))
            yield from (f"{source}.{alias.name}" for alias in node.names)
        else:
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))
            yield from imported_names(node, package)


def part_of(name: str) -> str | None:
    """The part that a dotted name lies in: 'batchnorm.nn.layers.X' -> 'nn'.

    A name of the public face lies where it is defined.
    """
    first, _, rest = name.partition(".")
    if first != "batchnorm" or rest == "__version__":
        return None
    head = rest.partition(".")[0]
    if head in batchnorm._PUBLIC and head not in LEVELS:
        return part_of(batchnorm._PUBLIC[head])
    return head


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Each import in the source of `module` that runs against the design, as a sentence."""
    importer = part_of(module)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for name in imported_names(ast.parse(source), package):
        imported = part_of(name)
        if imported is None or (name, importer) == ("batchnorm", "cli"):  # a command calls the public face
            continue
        known = LEVELS.keys() | BASE.keys() | {"reference"}
        if imported not in known:
            found.append(f"{module} imports {name}: no part of DESIGN.md (nor is the public face)")
        elif not may_import(importer, imported):
            found.append(f"{module} imports {name}: {importer} may not know {imported}")
        elif importer == imported == "kernels" and not name.startswith(module):
            found.append(f"{module} imports {name}: implementations never import one another")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package but the public face and the entry points, which may know all."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in {"batchnorm", "batchnorm.__main__"}:
            yield name, path


def test_the_design_says_the_same():
    assert f"`{ARROW}`" in re.sub(r"\s+", " ", (ROOT / "DESIGN.md").read_text())


def test_imports_run_one_way():
    found = []
    for name, path in modules():
        part = part_of(name)
        assert part in LEVELS.keys() | BASE.keys() | {"reference"}, f"{name}: no part of DESIGN.md"
        found += violations(path.read_text(), name, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules that import each other in a ring, and those that import such a one."""
    left = {name: set(known) for name, known in arrows.items()}
    while free := [name for name, known in left.items() if not known & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_modules_import_each_other_in_no_circle():
    """Inside the parts, too; imports within functions count."""
    known = dict(modules())
    arrows = {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named = set(imported_names(ast.parse(path.read_text()), package))
        named |= {each.rpartition(".")[0] for each in named if each not in known}
        arrows[name] = named & known.keys() - {name}
    lazy = {name for name, path in known.items() if path.name == "__init__.py"}  # public faces, which hand names on
    assert not circle({name: {k for k in at if k not in lazy} for name, at in arrows.items()})


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert not circle({"a": {"b"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("batchnorm.ops.x", "from batchnorm.nn import layers"),
        ("batchnorm.ops.x", "def f():\n    from batchnorm import functional"),
        ("batchnorm.ops.x", "class A:\n    def f(self):\n        import batchnorm.surgery.folding"),
        ("batchnorm.nn.layers", "from ..surgery import folding"),
        ("batchnorm.nn.layers", "from ...batchnorm.cli import main"),
        ("batchnorm.functional", "try:\n    from . import cli\nexcept ImportError:\n    pass"),
        ("batchnorm.functional", "import importlib\nimportlib.import_module('batchnorm.lab')"),
        ("batchnorm.surgery.folding", "import batchnorm as bn"),
        ("batchnorm.training.job", "from batchnorm import lab"),
        ("batchnorm.nn.layers", "from batchnorm import reference"),
        ("batchnorm.errors", "from batchnorm.moments import Moments"),
        ("batchnorm.moments", "from batchnorm import functional"),
        ("batchnorm.progress", "from batchnorm.errors import InputError"),
        ("batchnorm.reference", "from batchnorm.kernels import aten"),
        ("batchnorm.kernels.cpu", "from batchnorm.kernels import aten"),
        ("batchnorm.kernels.cpu", "from .aten import moments"),
        ("batchnorm.cli", "from batchnorm.nonsense import x"),
        ("batchnorm.ops.x", "if TYPE_CHECKING:\n    pass\nelse:\n    import batchnorm.nn"),
    ],
)
def test_the_walk_sees_arrows_that_run_back(module: str, source: str):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("batchnorm.ops.x", "from batchnorm.kernels import aten\nfrom .schemas import define"),
        ("batchnorm.nn.layers", "from batchnorm.errors import InputError\nimport torch"),
        ("batchnorm.nn.layers", "from batchnorm import Moments, __version__"),
        ("batchnorm.lab.x", "from batchnorm import reference\nfrom batchnorm.training import job"),
        ("batchnorm.cli", "import batchnorm\nfrom batchnorm import report, surgery, training"),
        (
            "batchnorm.ops.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import batchnorm.nn",
        ),
    ],
)
def test_the_walk_lets_the_design_through(module: str, source: str):
    assert not violations(source, module)


def fresh_interpreter(code: str) -> str:
    """What `code` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


IMPORTS = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
{statement}
took = time.perf_counter() - start
print(json.dumps([took, sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})]))
"""


@pytest.mark.parametrize(
    "statement",
    ["import batchnorm", "import batchnorm; batchnorm.BatchNorm2d", "import batchnorm.functional"],
)
def test_import_loads_nothing_heavy(statement: str):
    _, loaded = json.loads(fresh_interpreter(IMPORTS.format(statement=statement)))
    assert "batchnorm" in loaded
    assert not HEAVY & set(loaded)


def test_import_takes_under_50_ms_more_than_torch():
    runs = [json.loads(fresh_interpreter(IMPORTS.format(statement="import batchnorm"))) for _ in range(3)]
    assert min(took for took, _ in runs) < 0.05


START = """
import time, torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
x = torch.randn(64, 32)
torch.nn.BatchNorm1d(32)(x)  # torch starts its threads and allocator, and reads up to 7 MB of its own library
before = resident()
import batchnorm
layer = batchnorm.BatchNorm1d(32, activation="relu")
grown = resident() - before
start = time.process_time()
layer(x)
print(time.process_time() - start, grown)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_first_call_takes_under_20_ms_and_all_of_it_under_10_mb():
    runs = [[float(each) for each in fresh_interpreter(START).split()] for _ in range(3)]
    assert min(took for took, _ in runs) < 0.02
    assert min(grown for _, grown in runs) < 10e6
