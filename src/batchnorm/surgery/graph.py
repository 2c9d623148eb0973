"""Data flow of a network: which module's output goes into which, captured without changing it.

``torch.fx`` traces the network symbolically; where Python asks for a shape, once more with the shapes of the example
at hand; where that stops too, ``torch.export`` does, and its operators are gathered back into the modules that they
came from. All give one form: an ``fx.Graph`` whose ``call_module`` nodes are layers, whose ``get_attr`` nodes are
parameters and buffers read by anything else, and whose ``meta["val"]`` holds shapes and dtypes on the example.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from batchnorm.errors import InputError, SurgeryError
from batchnorm.surgery.comparison import (
    Example,
    copy_of,
    distances,
    leaves_of,
    random_state_kept,
    run_example,
    tensors_of,
)
from batchnorm.surgery.plan import references
from batchnorm.surgery.weights import applies_weights_once

_ROOT = "net"
_LEAF_PACKAGES = ("torch.nn.modules.", "torch.ao.nn.", "batchnorm.nn.", "batchnorm.surgery.")
_FROZEN_BUFFERS = ("weight", "bias", "running_mean", "running_var")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SHAPE_READERS = {"dim", "ndimension", "numel", "size", "sym_size"}
SHAPE_ATTRIBUTES = {"device", "dtype", "is_cuda", "ndim", "requires_grad", "shape"}
_METADATA = SHAPE_READERS | SHAPE_ATTRIBUTES | {"is_floating_point", "is_contiguous", "layout", "stride", "get_device"}
EXPORTED = "torch.export"


class DataFlow:
    """The captured graph of ``net`` and its modules.

    Attributes:
        graph: the ``fx.Graph``; editing it does not change the network.
        net: the network that was captured (not the copy that was traced).
        modules: each module by its first qualified name, shared modules once.
        method: ``"torch.fx"``; or ``"torch.fx on the example's shapes"`` or ``"torch.export"``: then the flow holds for
            these alone.
    """

    def __init__(self, graph: fx.Graph, net: nn.Module, method: str) -> None:
        self.graph = graph
        self.net = net
        self.method = method
        self.modules: dict[str, nn.Module] = dict(net.named_modules())
        self._first: dict[int, str] = {id(module): name for name, module in self.modules.items()}
        self._calls: dict[str, list[fx.Node]] = {}
        self._names: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self._calls.setdefault(self.name(node), []).append(node)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    def name(self, node: fx.Node) -> str:
        """The qualified name of the module or tensor behind a node."""
        if node not in self._names:
            path = str(node.target).removeprefix(_ROOT).removeprefix(".")
            called = node.op == "call_module"
            self._names[node] = self._first[id(self.net.get_submodule(path))] if called else path
        return self._names[node]

    def module(self, node: Any) -> nn.Module | None:
        """The layer that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.modules[self.name(node)]
        return None

    def calls(self, name: str) -> list[fx.Node]:
        """The nodes that call the module ``name``."""
        return [node for node in self._calls.get(name, []) if not node._erased]

    def readers(self, name: str) -> list[fx.Node]:
        """What reads the module's own parameters or buffers beside the module itself."""
        own = {
            id(t)
            for t in (
                *self.modules[name].parameters(recurse=False),
                *self.modules[name].buffers(recurse=False),
            )
        }
        return [
            user
            for node in self.nodes
            if node.op == "get_attr" and id(attribute(self.net, self.name(node))) in own
            for user in node.users
        ]

    def describe(self, node: fx.Node) -> str:
        """A node in words."""
        if node.op == "call_module":
            return self.name(node)
        if node.op == "output":
            return "the network's output"
        if node.op == "placeholder" or is_input(node):
            return "the network's input"
        if node.op == "get_attr":
            return f"the tensor {self.name(node)}"
        if node.target is observed:
            return f"the hooks of '{str(node.args[1]).removeprefix(_ROOT).removeprefix('.')}'"
        return f"a call of {operation(node)}"


def attribute(net: nn.Module, path: str) -> Any:
    """The attribute of a module or submodule at a qualified path, None where there is none."""
    value: Any = net
    for key in path.split("."):
        value = getattr(value, key, None)
    return value


def value_of(node: fx.Node) -> Any:
    """The node's value on the example as tensors without data."""
    return node.meta.get("val")


def rank(node: fx.Node) -> int | None:
    """The number of axes of a node's tensor on the example, None for anything but a tensor."""
    value = value_of(node)
    return value.dim() if isinstance(value, Tensor) else None


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The values that flow into a node, without the network's own parameters and buffers."""
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def is_input(node: fx.Node) -> bool:
    return node.op == "call_function" and operation(node) == "getitem" and node.all_input_nodes[0].op == "placeholder"


def operation(node: fx.Node) -> str:
    """The plain name of a function or method node: ``add`` for ``+``, ``+=``, ``torch.add`` and
    ``Tensor.add_`` alike."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target.overloadpacket.__name__)
    elif isinstance(target, str):
        name = target
    else:
        name = str(getattr(target, "__name__", target))
    name = name.rstrip("_") if not name.startswith("__") else name.strip("_")
    in_place = {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div"}
    return in_place.get(name, name)


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes what its class in torch.nn, or in this package, computes."""
    kind = type(module)
    methods = ("forward", "_conv_forward", "__call__")
    return (
        str(kind.forward.__module__).startswith(_LEAF_PACKAGES)
        and str(getattr(kind, "_conv_forward", kind.forward).__module__).startswith(_LEAF_PACKAGES)
        and kind.__call__ is nn.Module.__call__
        and not any(method in module.__dict__ for method in methods)
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether the graph keeps the module as one node."""
    if isinstance(module, _CONTAINERS):
        return False
    return is_plain(module) or isinstance(module, _BatchNorm) or is_known(module)


def is_known(module: nn.Module) -> bool:
    """Whether a class of its own computes what surgery understands, as seen from its outputs."""
    return is_frozen_affine(module) or (not has_hooks(module) and applies_weights_once(module))


def is_frozen_affine(module: nn.Module) -> bool:
    """Whether a module of any class is batch normalization as four buffers, like ``FrozenBatchNorm2d``.

    It is known by the names of its buffers, and by giving ``(x - mean) / sqrt(var + eps) * weight + bias`` on
    random numbers.
    """
    if isinstance(module, _BatchNorm) or set(module._buffers) - {"num_batches_tracked"} != set(_FROZEN_BUFFERS):
        return False
    if module._parameters or module._modules or has_hooks(module):
        return False
    weight, bias, mean, var = (module._buffers[key] for key in _FROZEN_BUFFERS)
    if not all(isinstance(t, Tensor) and t.dim() == 1 and t.is_floating_point() for t in (weight, bias, mean, var)):
        return False
    assert mean is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(mean), 3, 3, generator=generator).to(mean)
    y = nn.functional.batch_norm(x, mean, var, weight, bias, eps=float(getattr(module, "eps", 0.0)))
    try:
        with torch.no_grad():
            return bool(torch.allclose(module(x), y, rtol=1e-3, atol=1e-3 * float(y.abs().max()), equal_nan=True))
    except Exception:  # whatever a class of the same attributes raises
        return False


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody sees or may change what goes into or out of the module."""
    registries = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(registries)


def obstacle(flow: DataFlow, name: str) -> str | None:
    """Why the layer cannot be edited by itself, in words, or None."""
    module = flow.modules[name]
    calls = flow.calls(name)
    if not is_plain(module) and not is_known(module):
        return f"its class {type(module).__qualname__} has a forward of its own"
    if not calls:
        return "it is not called on the example's path (or only inside another layer)"
    if len(calls) > 1:
        return f"it is used {len(calls)} times"
    if parametrize.is_parametrized(module):
        return (
            "its parameters are computed by a parametrization; make it permanent with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if any(is_compiled(parent) for parent, _ in references(flow.net, module)):
        return "it is compiled by itself; compile the network instead"
    if has_hooks(module):
        return "it has hooks, which see or change its input or output; remove them first"
    readers = flow.readers(name)
    if readers:
        return f"its parameters or buffers are also read by {flow.describe(readers[0])}"
    return None


def unwrap(net: Any, verb: str) -> nn.Module:
    """The network behind ``torch.compile``; refuses what cannot be edited from outside.

    Raises:
        InputError: for anything but a ``torch.nn.Module``.
        SurgeryError: for scripted, lazy and parallel networks.
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"{verb}: expected a torch.nn.Module, got {type(net).__name__}")
    while is_compiled(net):
        net = _original(net)
    for name, module in net.named_modules():
        where = f"'{name}'" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise SurgeryError(f"{verb}: {where} is TorchScript; give the Python module instead")
        if hasattr(module, "module") and type(module).__module__.startswith("torch.nn.parallel"):
            raise SurgeryError(f"{verb}: {where} is a {type(module).__name__}; give its .module instead")
        lazy = [k for k, p in module.named_parameters(recurse=False) if nn.parameter.is_lazy(p)]
        if lazy:
            raise SurgeryError(f"{verb}: {where} is lazy, without shapes yet; call the network once first")
    return cast(nn.Module, net)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is the wrapper that ``torch.compile`` returns."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def _original(module: nn.Module) -> nn.Module:
    return cast(nn.Module, module._orig_mod)


def capture(net: nn.Module, example: Any) -> DataFlow:
    """The data flow of ``net`` on ``example``, in the modes that its modules are in.

    Everything runs on a copy, so that parameters, buffers, modes, hooks and the random state stay.
    The graph is run on the example and must give the network's own output.

    Raises:
        InputError: when the network fails on the example.
        SurgeryError: when neither torch.fx nor torch.export can capture the network.
    """
    given = Example.of(example)
    expected = run_example(_traceable(net)[0], given)
    failures = []
    attempts = {"torch.fx": _trace, "torch.fx on the example's shapes": _trace_on_example, EXPORTED: _export}
    for method, attempt in attempts.items():
        try:
            with random_state_kept(net), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph, output = attempt(net, given)
                _check_same(expected, output)
            return DataFlow(graph, net, method)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            failures.append(f"{method}: {type(error).__name__}: {first[0]}")
    raise SurgeryError(
        "the data flow of this network cannot be captured (" + "; ".join(failures) + "). "
        "Move what depends on the data's values out of forward, or edit the parts that can be "
        "captured one by one."
    )


def _traceable(net: nn.Module) -> tuple[nn.Module, set[int]]:
    """A copy without hooks, and the ids of its modules that had some.

    Batch normalization is in eval mode there, so that one value a channel, which training refuses,
    is enough.
    """
    traced = copy_of(net)
    hooked = {id(module) for module in traced.modules() if has_hooks(module)}
    for module in traced.modules():
        for key, value in module.__dict__.items():
            if key.startswith(("_forward", "_backward")) and isinstance(value, dict):
                value.clear()
        module._compiled_call_impl = None
        if isinstance(module, _BatchNorm) and is_plain(module):
            module.eval()
    return traced, hooked


def _check_same(expected: Any, output: Any) -> None:
    tensors = ([x for _, x in tensors_of(value)] for value in (expected, output))
    for distance in distances(*tensors):
        if not distance.relative <= 1e-3:
            raise SurgeryError("the captured graph does not give the network's own output")


class _Call(nn.Module):
    """One call of ``net`` from the list of the example's tensors to that of the output's, whatever holds them."""

    def __init__(self, net: nn.Module, example: Example) -> None:
        super().__init__()
        self.add_module(_ROOT, net)
        self.example = example

    def forward(self, inputs: Any) -> Any:
        count = 0
        leaves = []
        for leaf in self.example.leaves():
            if isinstance(leaf, Tensor):
                leaf = inputs[count]
                count += 1
            leaves.append(leaf)
        call = self.example.with_leaves(leaves)
        net = self._modules[_ROOT]
        assert net is not None
        output = net(*call.args, **call.kwargs)
        return [x for _, x in leaves_of(output) if isinstance(x, (Tensor, fx.Proxy))]


class _Recorder(fx.Interpreter):
    """Runs a graph and notes shape and dtype of every value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = pytree.tree_map(
            lambda x: torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x, value
        )
        return value


def observed(value: Any, name: str) -> Any:
    """Stands in the graph where the hooks of module ``name`` see, and may change, a value."""
    return value


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, net: nn.Module, hooked: set[int]) -> None:
        super().__init__()
        self.hooked = hooked
        self.leaves = {id(module) for module in net.modules() if is_leaf(module)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.leaves

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if is_compiled(m):
            return _original(m)(*args, **kwargs)
        if id(m) not in self.hooked:
            return super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        args, kwargs = self.observe((args, kwargs), name)
        return self.observe(super().call_module(m, forward, args, kwargs), name)

    def observe(self, value: Any, name: str) -> Any:
        return pytree.tree_map(
            lambda x: self.create_proxy("call_function", observed, (x, name), {}) if isinstance(x, fx.Proxy) else x,
            value,
        )


class _Known(fx.Proxy):
    """A proxy whose value on the example answers what Python asks of its shape."""

    tracer: ExampleTracer

    def __getattr__(self, k: str) -> Any:
        if k in SHAPE_ATTRIBUTES:
            return getattr(self.tracer.values[self.node], k)
        return super().__getattr__(k)

    def __len__(self) -> int:
        return len(self.tracer.values[self.node])


class ExampleTracer(_Tracer):
    """Computes every value on the example while it traces, and takes the way that its shapes, not its data, decide."""

    def __init__(self, net: nn.Module, hooked: set[int], inputs: list[Any]) -> None:
        super().__init__(net, hooked)
        self.inputs = iter(inputs)
        self.values: dict[fx.Node, Any] = {}
        self.computing = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        node = proxy.node
        value = self.values[node] = self.compute(node)
        if any(isinstance(x, Tensor) for _, x in leaves_of(value)) or node.op == "placeholder":
            return proxy
        known = not tensors_in(fx.map_arg((node.args, node.kwargs), self.values.__getitem__))
        if not known and operation(node) not in _METADATA:
            raise SurgeryError(f"{operation(node)} makes a Python value of the data")
        self.graph.erase_node(node)
        return value

    def compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self.inputs)
        interpreter = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        self.computing = True
        try:
            return getattr(interpreter, node.op)(node.target, args, kwargs)
        finally:
            self.computing = False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self.computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(self.values[obj.node]))])


def tensors_in(value: Any) -> bool:
    return any(isinstance(x, Tensor) for x in pytree.tree_leaves(value))


def _inputs(example: Example) -> list[Tensor]:
    return [x.detach().clone() for x in example.leaves() if isinstance(x, Tensor)]


def _trace(net: nn.Module, example: Example) -> tuple[fx.Graph, Any]:
    traced, hooked = _traceable(net)
    call = _Call(traced, example)
    return _recorded(call, _Tracer(traced, hooked).trace(call), net)


def _trace_on_example(net: nn.Module, example: Example) -> tuple[fx.Graph, Any]:
    traced, hooked = _traceable(net)
    call = _Call(traced, example)
    with random_state_kept(net), torch.no_grad():
        graph = ExampleTracer(traced, hooked, [_inputs(example)]).trace(call)
    return _recorded(call, graph, net)


def _recorded(call: _Call, graph: fx.Graph, net: nn.Module) -> tuple[fx.Graph, Any]:
    call.add_module(_ROOT, _traceable(net)[0])
    with random_state_kept(net), torch.no_grad():
        return graph, _Recorder(call, graph=graph).run(_inputs(call.example))


def _export(net: nn.Module, example: Example) -> tuple[fx.Graph, Any]:
    traced, hooked = _traceable(net)
    if hooked:
        raise SurgeryError("the network has forward hooks, which torch.export would hide")
    inputs = tuple(_inputs(example))
    program = torch.export.export(_Flat(traced, example), inputs, strict=False)
    with random_state_kept(net), torch.no_grad():
        output = program.module()(*inputs)
    return _Gathering(program, traced).graph, output


class _Flat(_Call):
    def forward(self, *inputs: Any) -> Any:
        return super().forward(inputs)


class _Gathering:
    """Gathers an exported program's operators back into calls of the modules they came from."""

    def __init__(self, program: torch.export.ExportedProgram, traced: nn.Module) -> None:
        self.traced = traced
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        signature = program.graph_signature
        self.tensors = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.inputs = list(signature.user_inputs)
        self.outputs = [spec.kind.name == "USER_OUTPUT" for spec in signature.output_specs]
        self.everything = self.graph.placeholder("inputs")
        self.gather(program.graph)

    def gather(self, exported: fx.Graph) -> None:
        calls = {node: self.call_of(node) for node in exported.nodes}
        groups: dict[str, list[fx.Node]] = {}
        for node, call in calls.items():
            if call is not None:
                groups.setdefault(call[0], []).append(node)
        for node, call in calls.items():
            if node.op == "placeholder":
                continue
            if node.op == "output":
                kept = [x for x, user in zip(node.args[0], self.outputs, strict=True) if user]
                self.graph.output(fx.map_arg(kept, self.get))
            elif call is None:
                self.new[node] = self.graph.node_copy(node, self.get)
            elif node is groups[call[0]][-1]:
                self.add_call(call[1], groups[call[0]])

    def call_of(self, node: fx.Node) -> tuple[str, str] | None:
        """The outermost layer that a node was computed in: (unique key of the call, name)."""
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            name = re.sub(r"@\d+", "", path)
            if name == _ROOT or name.startswith(f"{_ROOT}."):
                inner = name.removeprefix(_ROOT).removeprefix(".")
                if is_leaf(self.traced.get_submodule(inner)):
                    return key, name
        return None

    def add_call(self, name: str, group: list[fx.Node]) -> None:
        inside = set(group)
        arguments = [
            source
            for node in group
            for source in node.all_input_nodes
            if source not in inside and not self.tensors.get(source.name, "").startswith(f"{name}.")
        ]
        inputs = tuple(self.get(source) for source in dict.fromkeys(arguments))
        call = self.graph.call_module(name, inputs)
        results = [node for node in group if any(user not in inside for user in node.users)]
        if len(results) == 1:
            self.new[results[0]] = call
            call.meta["val"] = results[0].meta.get("val")
            return
        for index, node in enumerate(results):
            item = self.graph.call_function(operator.getitem, (call, index))
            item.meta["val"] = node.meta.get("val")
            self.new[node] = item

    def get(self, node: fx.Node) -> fx.Node:
        if node not in self.new:
            if node.name in self.tensors:
                self.new[node] = self.graph.get_attr(self.tensors[node.name])
            else:
                index = self.inputs.index(node.name)
                self.new[node] = self.graph.call_function(operator.getitem, (self.everything, index))
            self.new[node].meta["val"] = node.meta.get("val")
        return self.new[node]
