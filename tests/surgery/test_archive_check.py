"""Archives are read without running anything in them; those of ordinary networks load as torch loads them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_networks import Calls, mobilenet, randomize, resnet
from torch import nn
from torch._export.serde import schema
from torch.export import Dim
from torch.export.pt2_archive import PT2ArchiveWriter
from torch.utils import _pytree as pytree

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.errors import InputError
from batchnorm.population.formats.plain_pickles import NotPlainError, load_plain
from batchnorm.surgery.archive_check import load_archive
from batchnorm.surgery.archives import quiet
from batchnorm.surgery.files import convert_archive, fold_archive

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
X = torch.randn(2, 3, 16, 16)


class Buffers(nn.Module):
    """Buffers that are saved and not, a constant, an alias, a part without gradients, and named inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(3, 4, 3)
        self.other.weight = self.conv.weight
        self.register_buffer("kept", torch.rand(4, 1, 1))
        self.register_buffer("scratch", torch.rand(4, 1, 1).transpose(0, 1), persistent=False)
        self.constant = torch.tensor([True, False, True, True])[:, None, None]

    def forward(self, x, *, more, mode="nearest", flag=True):
        y = (self.conv(x) + self.other(x)) * self.kept + self.scratch.transpose(0, 1)
        with torch.no_grad():
            shift = y.mean()
        y = F.interpolate(y * self.constant, scale_factor=2, mode=mode) + more["a"][0] * more["b"]
        return {"out.0": (y, shift), "size": y.shape[0], "none": None}


def recurrent():
    net = Calls(lambda self, x: self.rnn(x)[0], rnn=nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True))
    return net, (torch.randn(2, 6, 5),), {}


def attention():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(2, 5, 8),), {}


def buffers():
    return Buffers(), (X,), {"more": {"a": [torch.tensor(2.0)], "b": 3.0}}


def complex_numbers():
    net = Calls(
        lambda self, x: torch.fft.irfft(torch.fft.rfft(self.linear(x)) * torch.tensor(1j)), linear=nn.Linear(3, 4)
    )
    return net, (torch.randn(2, 3),), {}


def strings():
    def forward(self, x):
        y = torch.einsum("bcij,dc->bdij", x, self.linear.weight)
        return (
            F.gelu(y, approximate="tanh")
            + torch.div(y, 3, rounding_mode="floor")
            + F.pad(y, (1, 1, 1, 1), "reflect").mean()
        )

    return Calls(forward, linear=nn.Linear(3, 4)), (X,), {}


ORDINARY = {
    "resnet": lambda: (randomize(resnet()), (X,), {}),
    "mobilenet": lambda: (randomize(mobilenet()), (X,), {}),
    "bfloat16": lambda: (randomize(resnet()).bfloat16(), (X.bfloat16(),), {}),
    "batchnorm": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4)), (X,), {}),
    "recurrent": recurrent,
    "attention": attention,
    "buffers": buffers,
    "complex": complex_numbers,
    "strings": strings,
}


def saved(path, net, args, kwargs=None, **options):
    torch.export.save(torch.export.export(net.eval(), args, kwargs, **options), path)
    return path


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_load_as_torch_loads_them(name, tmp_path):
    torch.manual_seed(0)
    net, args, kwargs = ORDINARY[name]()
    path = saved(tmp_path / "net.pt2", net, args, kwargs)
    with quiet():
        found, expected = load_archive(path), torch.export.load(path)
    assert [(n.name, str(n.target)) for n in found.graph.nodes] == [
        (n.name, str(n.target)) for n in expected.graph.nodes
    ]
    assert found.graph_signature == expected.graph_signature
    for key, value in {**expected.state_dict, **expected.constants}.items():
        other = {**found.state_dict, **found.constants}[key]
        assert torch.equal(other, value), key
        assert (other.dtype, other.stride(), other.requires_grad) == (value.dtype, value.stride(), value.requires_grad)
    results = [pytree.tree_leaves(p.module(check_guards=False)(*args, **kwargs)) for p in (found, expected)]
    for one, two in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two)) if one is not None else two is None
    assert len({p.untyped_storage()._cdata for p in found.state_dict.values()}) == len(
        {p.untyped_storage()._cdata for p in expected.state_dict.values()}
    )


def test_open_sizes_load(tmp_path):
    class Open(nn.Conv2d):
        def forward(self, x, y):
            z = super().forward(x)
            n = z.shape[0] * z.shape[2] // 2
            return F.adaptive_avg_pool2d(z, 2).reshape(x.shape[0], -1) * n + y.sum() + max(x.shape[2], 4) ** 2

    net, height = Open(3, 4, 3, 2), Dim("h", max=40)
    shapes = {"x": {0: Dim("n", min=2, max=64), 2: 2 * height, 3: Dim.AUTO}, "y": {0: Dim.DYNAMIC}}
    path = saved(tmp_path / "net.pt2", net, (X, torch.randn(5)), dynamic_shapes=shapes)
    with quiet():
        found, expected = load_archive(path), torch.export.load(path)
    assert {str(k): str(v) for k, v in found.range_constraints.items()} == {
        str(k): str(v) for k, v in expected.range_constraints.items()
    }
    args = (torch.randn(7, 3, 20, 11), torch.randn(3))
    assert torch.equal(found.module(check_guards=False)(*args), expected.module()(*args))


def test_an_archive_of_package_pt2_loads(tmp_path):
    package = pytest.importorskip("torch.export.pt2_archive._package").package_pt2
    program = torch.export.export(randomize(resnet()).eval(), (X,))
    path = tmp_path / "net.pt2"
    package(path, exported_programs=program)
    assert torch.equal(load_archive(path).module()(X), program.module()(X))


class Touch:
    """A pickle of it, unpickled without care, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def torch_saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit(**changes):
    """Edits of the program's JSON, by paths such as ``graph__nodes__0__target``."""

    def apply(members, marker):
        program = json.loads(members["models/model.json"])
        for path, value in changes.items():
            at, parts = program, path.split("__")
            for part in parts[:-1]:
                at = at[int(part) if isinstance(at, list) else part]
            last = int(parts[-1]) if isinstance(at, list) else parts[-1]
            at[last] = value.replace("MARKER", str(marker)) if isinstance(value, str) else value
        members["models/model.json"] = json.dumps(program).encode()

    return apply


def put(name, make):
    return lambda members, marker: members.update({name: make(marker)})


def pickled_row(kind, path, make):
    """A weight or constant that its table calls a pickle."""

    def apply(members, marker):
        name = f"data/{kind}/model_{kind}_config.json"
        table = json.loads(members[name])
        row = next(iter(table["config"].values()))
        table["config"]["more" if "obj" in path else next(iter(table["config"]))] = {
            **row,
            "path_name": path,
            "use_pickle": True,
        }
        members[name] = json.dumps(table).encode()
        members[f"data/{kind}/{path}"] = make(marker)

    return apply


def row(kind, **changes):
    def apply(members, marker):
        name = f"data/{kind}/model_{kind}_config.json"
        table = json.loads(members[name])
        next(iter(table["config"].values())).update(changes)
        members[name] = json.dumps(table).encode()

    return apply


CODE = "__import__('pathlib').Path('MARKER').touch()"
GRAPH = "graph_module__graph__"
TREE = '[1, {"type": "builtins.tuple", "context": "null", "children_spec": []}]'
PREPARED = {
    # members that torch unpickles
    "sample_inputs/model.pt, its pickle names __builtin__.getattr": put(
        "data/sample_inputs/model.pt", lambda m: torch_saved(((Touch(m),), {}))
    ),
    "sample_inputs/model.pt, it is no zip archive": put(
        "data/sample_inputs/model.pt", lambda m: pickle.dumps(Touch(m))
    ),
    "sample_inputs/model.pt, its pickle names numpy": put(
        "data/sample_inputs/model.pt", lambda m: torch_saved(((X.numpy(),), {}))
    ),
    "sample_inputs/model.pt, it has the text": put(
        "data/sample_inputs/model.pt", lambda m: torch_saved((("'" + CODE,), {}))
    ),
    "weights/weight_0": pickled_row("weights", "weight_0", lambda m: torch_saved(Touch(m))),
    "weights/model.pt": put("data/weights/model.pt", lambda m: torch_saved({"0.weight": Touch(m)})),
    "constants/tensor_0": pickled_row("constants", "tensor_0", lambda m: torch_saved(Touch(m))),
    "constants/model.pt": put("data/constants/model.pt", lambda m: torch_saved(Touch(m))),
    "constants/custom_obj_0": pickled_row("constants", "custom_obj_0", lambda m: pickle.dumps(Touch(m))),
    "constants/opaque_obj_0": pickled_row("constants", "opaque_obj_0", lambda m: pickle.dumps(Touch(m))),
    # members that are code, or of something else
    "aotinductor/model/net.so": put("data/aotinductor/model/net.so", lambda m: b"code"),
    "executorch/net.pte": put("data/executorch/net.pte", lambda m: b"code"),
    "extra/hook.py": put("extra/hook.py", lambda m: CODE.encode()),
    "models/second.json": put("models/second.json", lambda m: b"{}"),
    "code/__torch__.py": put("code/__torch__.py", lambda m: CODE.encode()),
    "../outside": put("../outside", lambda m: b""),
    "weights/weight_99": put("data/weights/weight_99", lambda m: b""),
    "archive_version": put("archive_version", lambda m: b"99"),
    # texts of the program that torch turns into names, expressions or code
    "models/model.json, guards_code has": edit(guards_code=[f"L['x'].size()[0] == 2 or {CODE}"]),
    "models/model.json, which is no condition on sizes": edit(guards_code=["L['x'].numpy()"]),
    "models/model.json, ExportedProgram.range_constraints is": edit(
        range_constraints={CODE: {"min_val": 0, "max_val": 2}}
    ),
    'models/model.json, SymExpr.expr_str is "__import__': edit(
        **{f"{GRAPH}sym_int_values": {"n": {"as_expr": {"expr_str": CODE, "hint": None}}}}
    ),
    'models/model.json, SymExpr.expr_str is "Symbol': edit(
        **{f"{GRAPH}sym_int_values": {"n": {"as_expr": {"expr_str": "Symbol('s0').__class__", "hint": None}}}}
    ),
    'models/model.json, SymExpr.expr_str is "Pow': edit(
        **{f"{GRAPH}sym_int_values": {"n": {"as_expr": {"expr_str": "Pow(Symbol('s0'), Integer(99))", "hint": None}}}}
    ),
    "models/model.json, Node.target is 'torch.serialization": edit(
        **{f"{GRAPH}nodes__0__target": "torch.serialization.load"}
    ),
    "models/model.json, Node.target is 'torch.ops.aten.__": edit(
        **{f"{GRAPH}nodes__0__target": "torch.ops.aten.__class__.default"}
    ),
    "models/model.json, Node.target is 'torch.ops.aten.from": edit(
        **{f"{GRAPH}nodes__0__target": "torch.ops.aten.from_file.default"}
    ),
    "models/model.json, Node.target is 'torch.ops.aten.set_": edit(
        **{f"{GRAPH}nodes__0__target": "torch.ops.aten.set_.source_Tensor"}
    ),
    "models/model.json, Node.target is 'torch.ops.aten.sparse": edit(
        **{f"{GRAPH}nodes__0__target": "torch.ops.aten.sparse_resize_.default"}
    ),
    "models/model.json, Node.target is 'torch.ops.nowhere": edit(
        **{f"{GRAPH}nodes__0__target": "torch.ops.nowhere.relu.default"}
    ),
    "models/model.json, Node.target is '#hook": edit(**{f"{GRAPH}nodes__0__target": "#hook:touch"}),
    "models/model.json, Node.target is '_operator": edit(**{f"{GRAPH}nodes__0__target": "_operator.methodcaller"}),
    "models/model.json, Node.target is 'torch.ops.higher_order": edit(
        **{f"{GRAPH}nodes__0__target": "torch.ops.higher_order.print"}
    ),
    "models/model.json, Argument is given as 'as_operator'": edit(
        **{f"{GRAPH}nodes__0__inputs__0__arg": {"as_operator": "torch.load"}}
    ),
    "models/model.json, Argument.as_string is": edit(**{f"{GRAPH}nodes__0__inputs__0__arg": {"as_string": CODE}}),
    "models/model.json, Argument is given as 'as_custom_obj'": edit(
        **{f"{GRAPH}nodes__0__inputs__0__arg": {"as_custom_obj": {"name": "a", "class_fqn": "b"}}}
    ),
    "models/model.json, Node.name is": edit(**{f"{GRAPH}nodes__0__name": f"x; {CODE}"}),
    "models/model.json, InputToParameterSpec.parameter_name is": edit(
        graph_module__signature__input_specs__0={"parameter": {"arg": {"name": "a"}, "parameter_name": f'x").{CODE}'}}
    ),
    "models/model.json, InputToBufferSpec.buffer_name is": edit(
        graph_module__signature__input_specs__0={"buffer": {"arg": {"name": "a"}, "buffer_name": "__class__"}}
    ),
    "models/model.json, ConstantValue.as_string is": edit(
        graph_module__signature__input_specs__0={
            "constant_input": {"name": "a", "value": {"as_string": f"' or {CODE}"}}
        }
    ),
    "models/model.json, ModuleCallSignature.forward_arg_names is": edit(
        graph_module__module_call_graph__0__signature__forward_arg_names=[f"x={CODE}"]
    ),
    "models/model.json, ModuleCallSignature.out_spec is": edit(
        graph_module__module_call_graph__0__signature__out_spec=TREE.replace(
            "builtins.tuple", "collections.defaultdict"
        )
    ),
    "models/model.json, ModuleCallSignature.in_spec is": edit(
        graph_module__module_call_graph__0__signature__in_spec=json.dumps(
            [
                1,
                {
                    "type": "builtins.dict",
                    "context": json.dumps([f"' + {CODE} + '"]),
                    "children_spec": [{"type": None, "context": None, "children_spec": []}],
                },
            ]
        )
    ),
    "models/model.json, named tuples": edit(graph_module__treespec_namedtuple_fields={"a.B": {"field_names": [CODE]}}),
    "models/model.json, the number NaN": edit(graph_module__signature__output_specs=float("nan")),
    "models/model.json, a key twice": lambda members, marker: members.update(
        {"models/model.json": b'{"guards_code": [], ' + members["models/model.json"][1:]}
    ),
    # tables that promise more than the bytes hold
    "weights/weight_0, it is empty": put("data/weights/weight_0", lambda m: b""),
    "weights/weight_1, it has 8 bytes": put("data/weights/weight_1", lambda m: b"\0" * 8),
    "model_weights_config.json, TensorMeta.sizes is missing": row("weights", tensor_meta={"dtype": 7}),
    "weights_config.json, path_name is": row("weights", path_name="../../x"),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Calls(lambda self, x: x * torch.tensor([[1.5]])))
    path = saved(tmp_path_factory.mktemp("honest") / "net.pt2", net, (X,))
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def written(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"net/{name}", data)
    return path


def test_the_honest_archive_loads_written_anew(honest, tmp_path):
    assert fold_archive(written(tmp_path / "net.pt2", honest))[1].folded


@pytest.mark.parametrize("case", PREPARED)
def test_prepared_members_are_refused_by_name(case, honest, tmp_path):
    if case.endswith("Node.name is") and "name" not in schema.Node.__dataclass_fields__:
        pytest.skip("the schema of this torch has no such field, and what it lacks is left out")
    members, marker = dict(honest), tmp_path / "marker"
    PREPARED[case](members, marker)
    assert members != honest
    path = written(tmp_path / "net.pt2", members)
    for read in (load_archive, fold_archive, convert_archive):
        with pytest.raises(InputError) as caught:
            read(path)
        member, _, reason = case.partition(", ")
        assert f"{member} is refused: " in str(caught.value)
        assert reason in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("command", ["summary", "fold", "convert"])
def test_the_command_line_refuses_with_code_2(command, honest, tmp_path, capsys):
    members, marker = dict(honest), tmp_path / "marker"
    PREPARED["sample_inputs/model.pt, its pickle names __builtin__.getattr"](members, marker)
    path = written(tmp_path / "net.pt2", members)
    out = [] if command == "summary" else ["--out", str(tmp_path / "out.pt2")]
    assert main([command, str(path), *out]) == 2
    error = capsys.readouterr().err
    assert "data/sample_inputs/model.pt" in error.replace("\n", "")
    assert "Traceback" not in error
    assert not marker.exists()
    assert not (tmp_path / "out.pt2").exists()


def test_plain_parts_that_do_not_fit_together(honest, tmp_path):
    members = dict(honest)
    edit(graph_module__module_call_graph__0__signature__forward_arg_names=["self"])(members, "")
    with pytest.raises(InputError, match=r"cannot be read|fails on the example"):
        fold_archive(written(tmp_path / "net.pt2", members))


def test_descriptions_are_left_out(honest, tmp_path):
    """What torch would look up by name, and no program needs, does not reach it."""
    members = dict(honest)
    metadata = {"source_fn_stack": "conv,torch.hub.load", "custom": '{"a": 1}', "nn_module_stack": "a,b,c"}
    edit(**{f"{GRAPH}nodes__0__metadata": metadata, "graph_module__metadata": {"custom": '{"a": 1}'}})(members, "")
    program = load_archive(written(tmp_path / "net.pt2", members))
    meta = next(n for n in program.graph.nodes if n.op == "call_function").meta
    assert "source_fn_stack" not in meta
    assert "custom" not in {**meta, **program.graph_module.meta}


def test_zip_archives_are_plain(honest, tmp_path):
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in honest.items():
            archive.writestr(f"net/{name}", data)
    with pytest.raises(InputError, match="is compressed"):
        load_archive(path)
    with zipfile.ZipFile(written(path, honest), "a") as archive:
        archive.writestr("net/archive_format", b"pt2")
    with pytest.raises(InputError, match=r"net/archive_format.*no name of its own"):
        load_archive(path)
    for name in ("/archive_format", "other/archive_format", "archive_format"):
        with zipfile.ZipFile(written(path, honest), "a") as archive:
            archive.writestr(name, b"pt2")
        with pytest.raises(InputError, match="archive_format"):
            load_archive(path)
    written(path, honest)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"cannot be read|is missing"):
        load_archive(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_archive(tmp_path / "missing.pt2")


def test_members_that_are_missing_are_named(honest, tmp_path):
    for name in honest:
        if name.startswith(".data") or name == "byteorder":
            continue
        members = {key: value for key, value in honest.items() if key != name}
        with pytest.raises(InputError, match=rf"member {name} is refused: it is missing"):
            load_archive(written(tmp_path / "net.pt2", members))


VALUES = [
    (torch.randn(2, 3), {"a": [torch.arange(4), 1.5], "b": (None, True, "text", 3, -(2**40))}),
    (torch.randn(3, 4).t()[1:], torch.randn(4)[::2], torch.zeros(0, 3), torch.tensor(1 + 2j)),
    {"weight": nn.Parameter(torch.randn(3).bfloat16()), "bool": torch.tensor([True, False])},
    tuple(torch.zeros(2, dtype=d) for d in (torch.float8_e4m3fn, torch.uint16, torch.int8, torch.float16)),
    (torch.float32, torch.device("cpu"), torch.Size([2, 3])),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("index", range(len(VALUES)))
def test_plain_values_are_read_as_torch_reads_them(index, protocol):
    buffer = io.BytesIO()
    torch.save(VALUES[index], buffer, pickle_protocol=protocol)
    found, expected = load_plain(buffer.getvalue()), VALUES[index]
    one, two = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(one, two, strict=True):
        if isinstance(b, torch.Tensor):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert a.requires_grad == b.requires_grad
            raw = [t.contiguous().view(torch.uint8) if t.element_size() == 1 else t for t in (a, b)]
            assert torch.equal(*raw)
        else:
            assert (type(a), a) == (type(b), b)


def test_attributes_of_tensors_are_left_out():
    x = torch.randn(3)
    x._dynamo_weak_dynamic_indices = {0}  # as torch.export does
    (y,) = load_plain(torch_saved((x,)))
    assert torch.equal(x, y)
    assert not vars(y)
    x.more = Touch("nowhere")
    with pytest.raises(NotPlainError, match="getattr"):
        load_plain(torch_saved((x,)))


def test_shared_storages_stay_shared():
    x = torch.randn(4)
    one, two = load_plain(torch_saved((x, x[1:])))
    one.fill_(3)
    assert torch.equal(two, torch.full((3,), 3.0))


def test_storages_that_lack_bytes_are_refused():
    with zipfile.ZipFile(io.BytesIO(torch_saved((torch.randn(4), torch.tensor([True]))))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, data in (("archive/data/0", b"\0" * 8), ("archive/data/1", b"\2")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key, value in {**members, name: data}.items():
                archive.writestr(key, value)
        with pytest.raises(NotPlainError, match=r"data/[01]"):
            load_plain(buffer.getvalue())


def test_custom_records_of_the_writer_are_refused(tmp_path):
    path = tmp_path / "net.pt2"
    with PT2ArchiveWriter(str(path)) as writer:
        writer.write_bytes("models/model.json", b"{}")
        writer.write_bytes("hooks", b"")
    with pytest.raises(InputError, match=r"models/model\.json is refused"):
        load_archive(path)
