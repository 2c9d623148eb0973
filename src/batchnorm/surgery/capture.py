"""The data flow of a network, captured without changing it.

``torch.fx`` traces the network symbolically; where Python asks for a shape, once more with the shapes of the example
at hand; where that stops too, ``torch.export`` does, and its operators are gathered back into the modules that they
came from. All give one form: an ``fx.Graph`` whose ``call_module`` nodes are layers, whose ``get_attr`` nodes are
parameters and buffers read by anything else, and whose ``meta["val"]`` holds shapes and dtypes on the example.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from batchnorm.errors import BatchNormError, SurgeryError
from batchnorm.nn.outside import NORM, followed_by_norm, has_hooks, is_followed
from batchnorm.surgery.comparison import (
    Draws,
    Example,
    copy_of,
    distances,
    leaves_of,
    random_state_kept,
    run_example,
    tensors_of,
)
from batchnorm.surgery.flow import (
    EXPORTED,
    IS_ZERO,
    ROOT,
    SHAPE_ATTRIBUTES,
    SHAPE_READERS,
    DataFlow,
    attribute,
    observed,
    operation,
)
from batchnorm.surgery.modules import is_compiled, is_leaf, is_plain, original
from batchnorm.surgery.rounding import attempt as run_or_none

_FOLLOWED = "_is_followed_by_norm"
_METADATA = SHAPE_READERS | SHAPE_ATTRIBUTES | {"is_floating_point", "is_contiguous", "layout", "stride", "get_device"}


class NotCapturedError(SurgeryError):
    """A network, or a part of one, whose data flow no graph follows.

    Attributes:
        short: why, as the end of a sentence about it.
    """

    def __init__(self, failures: list[str]) -> None:
        super().__init__(
            "the data flow of this network cannot be captured (" + "; ".join(failures) + "). "
            "Move what depends on the data's values out of forward, or edit the parts that can be "
            "captured one by one."
        )
        self.short = f"cannot be captured ({failures[0]})"


class Traced(NamedTuple):
    """A graph, the output that it gave on the example, and whether random numbers that are not in it shaped it."""

    graph: fx.Graph
    output: Any
    draws: bool = False


def capture(net: nn.Module, example: Any, *, evaluation: bool = False) -> DataFlow:
    """The data flow of ``net`` on ``example``, in the modes that its modules are in, or in evaluation.

    Everything runs on a copy, so that parameters, buffers, modes, hooks and the random state stay. The graph is run on
    the example and must give the network's own output. Hooks are left out, and stand in the graph as observers of
    values. A network that does not run without its hooks, or gives outputs of another structure then, is traced with
    them. A forward that draws random numbers in Python, to skip layers in training, say, gives the flow of one draw,
    whose ``draws`` is True.

    Raises:
        InputError: when the network fails on the example.
        NotCapturedError: when neither torch.fx nor torch.export can capture the network.
    """
    given = Example.of(example)
    shown = copy_of(net, training=False) if evaluation else net
    keeps = _needs_hooks(shown, given)
    expected = run_example(_traceable(shown, keeps, runs=True)[0], given)
    failures = []
    attempts = {"torch.fx": _trace, "torch.fx on the example's shapes": _trace_on_example, EXPORTED: _export}
    for method, attempt in attempts.items():
        try:
            with random_state_kept(net), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph, output, draws = attempt(shown, given, keeps)
                _check_same(expected, output)
            return DataFlow(graph, net, method, draws)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            failures.append(f"{method}: {type(error).__name__}: {first[0]}")
    raise NotCapturedError(failures)


def capture_settled(net: nn.Module, example: Any) -> DataFlow:
    """`capture`, in evaluation where the forward is random, fails or cannot be followed in the modes of ``net``."""
    if not any(module.training for module in net.modules()):
        return capture(net, example)
    with contextlib.suppress(BatchNormError):
        flow = capture(net, example)
        if not flow.draws:
            return flow
    return capture(net, example, evaluation=True)


def _needs_hooks(net: nn.Module, example: Example) -> bool:
    """Whether the forward reads what the network's own hooks collect, as a run without them shows."""
    if not any(has_hooks(module) for module in net.modules()):
        return False
    without = run_or_none(_traceable(net, runs=True)[0], example)
    if without is None:
        return run_or_none(_traceable(net, keeps=True)[0], example) is not None
    with_hooks = run_or_none(_traceable(net, keeps=True)[0], example)
    return with_hooks is not None and [p for p, _ in tensors_of(with_hooks)] != [p for p, _ in tensors_of(without)]


def _traceable(net: nn.Module, keeps: bool = False, runs: bool = False) -> tuple[nn.Module, set[int]]:
    """A copy without hooks, or with those of the forward, and the ids of its modules that had some.

    Layers that are followed by a normalization have their hook in a copy that ``runs``; in others the normalization is
    a layer of its own in the graph.

    Batch normalization is in eval mode there, so that one value a channel, which training refuses,
    is enough.
    """
    traced = copy_of(net)
    hooked = {id(module) for module in traced.modules() if has_hooks(module)}
    for module in traced.modules():
        followed = is_followed(module)
        for key, value in module.__dict__.items():
            if key.startswith("_backward" if keeps else ("_forward", "_backward")) and isinstance(value, dict):
                value.clear()
        if followed and runs and not keeps:
            module.register_forward_hook(followed_by_norm)
        elif followed and not runs:
            module.__dict__[_FOLLOWED] = True
            for number in [n for n, hook in module._forward_hooks.items() if hook is followed_by_norm]:
                del module._forward_hooks[number]
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
        self.add_module(ROOT, net)
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
        net = self._modules[ROOT]
        assert net is not None
        output = net(*call.args, **call.kwargs)
        return [x for _, x in leaves_of(output) if isinstance(x, (Tensor, fx.Proxy))]


class _Recorder(fx.Interpreter):
    """Runs a graph and notes shape and dtype of every value, and which constants are zero everywhere."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        _note(n, value)
        return value


def _note(node: fx.Node, value: Any) -> None:
    if node.op == "get_attr" and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        node.meta[IS_ZERO] = not bool(value.any())
    node.meta["val"] = pytree.tree_map(
        lambda x: torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x, value
    )


class Follower(fx.Tracer):
    """Follows modules that a forward makes as it goes, such as a slice of a ``Sequential``, into what they call."""

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        is_made = m not in (self.submodule_paths or {})
        return forward(*args, **kwargs) if is_made else super().call_module(m, forward, args, kwargs)


class _Tracer(Follower):
    proxy_buffer_attributes = True

    def __init__(self, net: nn.Module, hooked: set[int]) -> None:
        super().__init__()
        self.hooked = hooked
        self.behind = False
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
            return original(m)(*args, **kwargs)
        if _FOLLOWED in m.__dict__ and id(m) in self.leaves and not self.behind:
            self.behind = True
            output = self.call_module(m, forward, args, kwargs)
            self.behind = False
            norm: Any = m._modules[NORM]
            return self.call_module(norm, norm.forward, (output,), {})
        if id(m) not in self.hooked:
            return self.recorded(m, forward, args, kwargs)
        name = self.path_of_module(m)
        args, kwargs = self.observe((args, kwargs), name)
        if id(m) not in self.leaves:  # whose call runs the hooks that are left
            return self.observe(self.recorded(m, forward, args, kwargs), name)
        args, kwargs = _run_pre_hooks(m, args, kwargs)
        return self.observe(_run_hooks(m, args, kwargs, self.recorded(m, forward, args, kwargs)), name)

    def recorded(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a layer or of a forward; one that a forward tries, and that fails, leaves the tracer's stack."""
        depth = len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise

    def observe(self, value: Any, name: str) -> Any:
        return pytree.tree_map(
            lambda x: self.create_proxy("call_function", observed, (x, name), {}) if isinstance(x, fx.Proxy) else x,
            value,
        )


def _run_pre_hooks(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call after the hooks before it, as ``torch.nn.Module.__call__`` has them."""
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _run_hooks(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The result of a call after the hooks behind it."""
    for key, hook in module._forward_hooks.items():
        more = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        changed = hook(module, args, *more, output)
        output = output if changed is None else changed
    return output


class _Known(fx.Proxy):
    """A proxy whose value on the example answers what Python asks of its shape."""

    tracer: ExampleTracer

    def __getattr__(self, k: str) -> Any:
        if k in SHAPE_ATTRIBUTES:
            return getattr(self.tracer.values[self.node], k)
        return super().__getattr__(k)

    def __len__(self) -> int:
        return len(self.tracer.values[self.node])

    def __setitem__(self, key: Any, value: Any) -> None:
        """A user of the value more, so that no edit takes it for what its layer gave."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Values(dict[fx.Node, Any]):
    """The values of nodes; those of tensors that a forward makes of Python numbers are attributes of the root."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __missing__(self, node: fx.Node) -> Any:
        if node.op != "get_attr":
            raise KeyError(node)
        self[node] = attribute(self.tracer.root, str(node.target))
        return self[node]


class ExampleTracer(_Tracer):
    """Computes every value on the example while it traces, and takes the way that its shapes, not its data, decide."""

    def __init__(self, net: nn.Module, hooked: set[int], inputs: list[Any]) -> None:
        super().__init__(net, hooked)
        self.inputs = iter(inputs)
        self.values: dict[fx.Node, Any] = _Values(self)
        self.computing = False
        self.random = Draws(net)
        self.draws = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        node = proxy.node
        try:
            value = self.values[node] = self.compute(node)
        except Exception:  # which the forward may catch
            self.graph.erase_node(node)
            raise
        is_tensor = any(isinstance(x, Tensor) for _, x in leaves_of(value))
        if is_tensor or node.op == "placeholder" or node.target is operator.setitem:
            return proxy
        known = not tensors_in(fx.map_arg((node.args, node.kwargs), self.values.__getitem__))
        # An attribute of a tensor that is no tensor says nothing of the data.
        if not known and operation(node) not in _METADATA | {"getattr"}:
            raise SurgeryError(f"{operation(node)} makes a Python value of the data")
        self.graph.erase_node(node)
        return value

    def compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self.inputs)
        interpreter = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        self.draws |= self.random.moved()
        self.computing = True
        try:
            return getattr(interpreter, node.op)(node.target, args, kwargs)
        finally:
            self.computing = False
            self.random.moved()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self.computing:
            return m.forward(*args, **kwargs) if id(m) in self.hooked else forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(self.values[obj.node]))])


def tensors_in(value: Any) -> bool:
    return any(isinstance(x, Tensor) for x in pytree.tree_leaves(value))


def _inputs(example: Example) -> list[Tensor]:
    return [x.detach().clone() for x in example.leaves() if isinstance(x, Tensor)]


def _trace(net: nn.Module, example: Example, keeps: bool) -> Traced:
    traced, hooked = _traceable(net, keeps)
    call = _Call(traced, example)
    return _recorded(call, traced_without_draws(_Tracer(traced, hooked), call), net)


def traced_without_draws(tracer: fx.Tracer, module: nn.Module) -> fx.Graph:
    """The graph of a forward that draws no random numbers outside it: these would be constants there.

    Raises:
        SurgeryError: it draws some.
    """
    with random_state_kept(module):
        draws = Draws(module)
        graph = tracer.trace(module)
        if draws.moved():
            raise SurgeryError("random numbers are drawn outside the operators on its input")
    return graph


def trace_module(module: nn.Module) -> fx.Graph:
    """The graph of a module's own forward, with the same layers as in `capture`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return traced_without_draws(_Tracer(module, set()), module)


def _trace_on_example(net: nn.Module, example: Example, keeps: bool) -> Traced:
    traced, hooked = _traceable(net, keeps)
    call = _Call(traced, example)
    with random_state_kept(net), torch.no_grad():
        tracer = ExampleTracer(traced, hooked, [_inputs(example)])
        graph = tracer.trace(call)
        if not (tracer.draws or tracer.random.moved()):
            return _recorded(call, graph, net)
    for node in graph.nodes:  # another run would draw other numbers
        if node.op != "output":
            _note(node, tracer.values[node])
    (result,) = (node for node in graph.nodes if node.op == "output")
    return Traced(graph, fx.map_arg(result.args[0], tracer.values.__getitem__), True)


def _recorded(call: _Call, graph: fx.Graph, net: nn.Module) -> Traced:
    call.add_module(ROOT, _traceable(net)[0])
    with random_state_kept(net), torch.no_grad():
        return Traced(graph, _Recorder(call, graph=graph).run(_inputs(call.example)))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the graph that torch.export prints when it fails; its error says what failed."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export(net: nn.Module, example: Example, keeps: bool) -> Traced:
    traced, hooked = _traceable(net, keeps)
    if hooked or any(_FOLLOWED in module.__dict__ for module in traced.modules()):
        raise SurgeryError("the network has forward hooks, which torch.export would hide")
    inputs = tuple(_inputs(example))
    with _silent():
        program = torch.export.export(_Flat(traced, example), inputs, strict=False)
    with random_state_kept(net), torch.no_grad():
        output = program.module()(*inputs)
    return Traced(_Gathering(program, traced).graph, output)


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
            if name == ROOT or name.startswith(f"{ROOT}."):
                inner = name.removeprefix(ROOT).removeprefix(".")
                if is_leaf(self.traced.get_submodule(inner)):
                    return key, name
        return None

    def add_call(self, name: str, group: list[fx.Node]) -> None:
        inside = set(group)
        own = self.traced.get_submodule(name.removeprefix(ROOT).removeprefix("."))
        tensors = {id(tensor) for tensor in (*own.parameters(), *own.buffers())}
        arguments = [
            source
            for node in group
            for source in node.all_input_nodes
            if source not in inside and not self.is_among(source, name, tensors)
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

    def is_among(self, source: fx.Node, name: str, tensors: set[int]) -> bool:
        """Whether a node is a tensor of the module ``name``, whose ``tensors`` may have another module's name, too."""
        path = self.tensors.get(source.name)
        if path is None:
            return False
        found = attribute(self.traced, path.removeprefix(f"{ROOT}."))
        return path.startswith(f"{name}.") or id(found) in tensors

    def get(self, node: fx.Node) -> fx.Node:
        if node not in self.new:
            if node.name in self.tensors:
                self.new[node] = self.graph.get_attr(self.tensors[node.name])
            else:
                index = self.inputs.index(node.name)
                self.new[node] = self.graph.call_function(operator.getitem, (self.everything, index))
            self.new[node].meta["val"] = node.meta.get("val")
        return self.new[node]
