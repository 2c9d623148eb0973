"""Acceleration: torch's batch normalization, residual and activation become one fused layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from batchnorm.errors import InputError, SurgeryError
from batchnorm.kernels import aten
from batchnorm.nn import batch_norm as ours
from batchnorm.nn import foreign
from batchnorm.nn.outside import GUARDED, has_hooks
from batchnorm.surgery import activations, chains, concatenations, containers, depthwise, pooling
from batchnorm.surgery.activations import Activation
from batchnorm.surgery.capture import Follower, capture, traced_without_draws
from batchnorm.surgery.comparison import (
    Distance,
    Example,
    copy_of,
    distances,
    random_state_kept,
    run_example,
    seed_all,
)
from batchnorm.surgery.conversion import REPORT, Absorbed, becoming, our_class, refusal, replacing
from batchnorm.surgery.flow import DataFlow, operation
from batchnorm.surgery.frozen import told_of_frozen
from batchnorm.surgery.layers import AddActivation
from batchnorm.surgery.memory import remake_what_costs_little
from batchnorm.surgery.memory_order import MemoryOrder, lay_out
from batchnorm.surgery.modules import is_leaf, is_plain, obstacle, obstacle_outside, unwrap
from batchnorm.surgery.plan import Plan, Step, references, transaction
from batchnorm.surgery.rounding import TOLERANCE, Rounding, trembling
from batchnorm.surgery.subclasses import NORM, opened
from batchnorm.surgery.trial_runs import DRAWS, Runs

_CHANGES = "its forward changes numbers or generators of its own, by which the next one may decide"
_EXACT = 1e-7  # of the largest value, in float64
_TRIALS = 3  # of how far a network in training mode moves with its last bits


def accelerate(net: nn.Module, example: Any, *, inplace: bool = True, channels_last: bool | None = False) -> nn.Module:
    """Make batch normalization, the addition of a residual and the activation after it one fused layer.

    Every ``torch.nn.BatchNorm*d`` becomes this package's layer of the same name: the same object with the same
    parameters, statistics and ``state_dict`` keys. If it alone feeds

    - an activation module that is called nowhere else, the activation moves into the layer, and an identity takes its
      place. Another shape or order of the values may lie between (``flatten``, ``transpose``); before ReLU and
      LeakyReLU also a dropout, with which they commute;
    - an addition, or an activation that is a call (``F.relu``) or a shared module, the forward of the module that
      makes the call is generated anew from its captured graph, with one call of the fused layer in their place; two
      of them if the forward is another one in training mode (``F.dropout(x, p, self.training)``). Where it decides by
      arguments that are no tensors, it is generated for those of the example; from the first call with others on the
      module's own forward computes these activations again. The module stays the same object; its class becomes a
      subclass of its own. It can be copied but not pickled before ``revert``;
    - a concatenation along the channels that nobody else reads, the layer reads its parts, by such a forward, too. In
      training each part is measured once, whoever normalizes it;
    - a pooling of images (``MaxPool2d``, ``AvgPool2d`` without padding), both are one call on the CPU. A 1x1
      convolution between a layer and an ``AvgPool2d`` then goes behind the pooling, which is equal up to rounding.

    A depthwise convolution (``Conv1d``, ``Conv2d``) whose output a layer alone reads is computed by the layer's call on
    the CPU, and so is a layer before it whose output it alone reads. What lies between them is in no memory but the
    caches: the backward makes it again. If someone hooks one of these modules, or the input does not fit (other
    devices, autocast, compiled code), they are called one after the other, as they stand.

    What a network calls several times (the branch of a siamese network) takes part where each call does the same.

    Outputs whose making takes little time beside a step, estimated from the sizes on the example, are made again in the
    backward where a convolution reads them, with the same bits, instead of being kept for it. ``keeps_output`` of a
    layer says so (False); `save_memory` and `recompute_outputs` save more.

    A subclass of torch.nn's layers whose forward is normalization and an activation, such as timm's
    ``BatchNormAct2d``, becomes a fused layer, too. It stays an instance of its class.

    If another tool puts a layer of its own in the place of a fused one afterwards, the activation and the addition
    are computed as before: neither is lost.

    A forward that draws random numbers itself, or that changes numbers or generators of its own, by which it may skip
    layers in training, stays as it is. A network that cannot be captured as a whole is accelerated in the parts that
    can.

    The result is verified on the example: outputs in evaluation mode; outputs, running statistics and all gradients
    for a random upstream gradient in training mode, in float64 to 1e-7 of the largest value; for three seeds where the
    forward draws. ``revert`` undoes it.
    ``net.report``, an `Acceleration`, tells what was fused, what was kept, and why. It is not set if the class of the
    network has an attribute of that name.

    Args:
        net: the network.
        example: an input that it can also be trained on: a tensor, a tuple of positional or a mapping of keyword
            arguments.
        inplace: change ``net``, or a copy of it.
        channels_last: True puts the channels last in the memory of the weights of all convolutions, and so of what they
            compute; the network then computes the same up to rounding, often in less time. None does it if training
            steps on the example, measured here, take at least 3 % less time so. False leaves the order alone. Do it
            before the first step of an optimizer, whose state takes the order of the weights.

    Returns:
        ``net``, or the copy.

    Warns:
        UserWarning: no layer was changed, or no weight with ``channels_last=True``; the warning tells why. Or outputs
            on the example differ since rounding alone decides a choice of the network (``topk`` between scores that
            are equal up to rounding); with the same choices they agree.

    Raises:
        InputError: when ``net`` is no module, or fails on the example in either mode; when ``channels_last`` is neither
            True, False nor None.
        SurgeryError: when there is no batch normalization, the result differs, or the network can't be run with
            ``channels_last=True``; ``net`` is then as it was.

    Source: this package; He et al. 2016 and Huang et al. 2017 for the additions and concatenations that it looks for.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> accelerate(net, torch.randn(2, 3, 8, 8))[1].activation
        'relu'
    """
    root = unwrap(net, "accelerate")
    if channels_last not in (True, False, None):
        raise InputError(f"accelerate: got channels_last={channels_last!r}; expected True, False, or None to measure")
    if not inplace:
        root = net = copy_of(root)
    given = Example.of(example)
    plan, report = _planned(root, given)
    with transaction(root):
        plan.apply()
        remade = remake_what_costs_little(root, given, report.convolved) if report.fused or report.swapped else {}
        order = None
        if channels_last is not False:
            order = lay_out(root, given, lambda a, b: _verify(a, b, given), only_if_faster=channels_last is None)
    report = dataclasses.replace(report, remade=remade, order=order)
    laid_out = order is not None and bool(order.convolutions)
    if not report.fused and not report.swapped and not laid_out:
        warnings.warn(f"accelerate changed nothing. {report}", stacklevel=2)
        return net
    if channels_last and not laid_out:
        warnings.warn(f"accelerate: {order}", stacklevel=2)
    if not hasattr(type(root), REPORT) and root._modules.get(REPORT) is None:
        root.__dict__[REPORT] = report
    return net


def plan_acceleration(net: nn.Module, example: Any) -> Plan:
    """What ``accelerate`` would do, as a plan to read (``print(plan)``) and to ``apply``."""
    return _planned(unwrap(net, "accelerate"), example)[0]


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did.

    Attributes:
        fused: what each fused layer computes besides its normalization, by the layer's name.
        swapped: the names of layers that became this package's, with nothing to fuse behind them.
        kept: the reason for each layer that stayed as it was, by name.
        unfused: the reason for each module whose own calls could not be fused, by name.
        remade: the bytes on the example of each output that is made again in the backward instead of kept, by the
            layer's name; `save_memory` chooses others.
        convolved: the names of layers that take in the depthwise convolution before them.
        order: what became of the order of the convolutions' weights, where ``channels_last`` asked for another one.
    """

    fused: dict[str, str]
    swapped: tuple[str, ...]
    kept: dict[str, str]
    unfused: dict[str, str]
    remade: dict[str, int] = field(default_factory=dict)
    convolved: tuple[str, ...] = ()
    order: MemoryOrder | None = None

    def __str__(self) -> str:
        counts = f"{len(self.fused)} fused, {len(self.swapped)} without anything to fuse, {len(self.kept)} kept"
        total = len(self.fused) + len(self.swapped) + len(self.kept)
        lines = [f"Of {total} batch normalization layers: {counts}."]
        lines += [f"  {name}: fused with {what}" for name, what in self.fused.items()]
        lines += [f"  {name}: this package's layer" for name in self.swapped]
        lines += [f"  {name}: kept, since it {reason}" for name, reason in self.kept.items()]
        lines += [f"  {name or 'the network'}: calls not fused: {reason}" for name, reason in self.unfused.items()]
        if self.remade:
            size = sum(self.remade.values()) / 1e6
            lines.append(f"The backward makes {len(self.remade)} outputs again ({size:.1f} MB on the example).")
        if self.order is not None:
            lines.append(str(self.order))
        return "\n".join(lines)


def _planned(net: nn.Module, example: Any) -> tuple[Plan, Acceleration]:
    given = Example.of(example)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        raise SurgeryError("accelerate: the network has no batch normalization" + told_of_frozen(net))
    inside = _inside(net, layers, given)
    own = {name: found for name, found in inside.items() if not isinstance(found, str)}
    refused = {
        name: inside.get(name) or refusal(layer) or _no_class(layer)
        for name, layer in layers.items()
        if name not in own
    }
    skipped = {name: str(reason) for name, reason in refused.items() if reason is not None}
    fusions = Fusions(net=net, candidates=layers.keys() - skipped.keys(), inside=own)
    fusions.find(given)
    seeds = range(DRAWS if fusions.draws else 1)
    steps, swapped = [], []
    for name in sorted(layers.keys() - skipped.keys(), key=list(layers).index):
        fused = fusions.fused.get(name)
        options: dict[str, Any] = {} if fused is None else {"activation": fused.name, "negative_slope": fused.slope}
        kind = foreign.class_for(type(layers[name]), "fused") if name in own else our_class(layers[name])
        assert kind is not None
        if options and name not in own:
            options[GUARDED] = True
        if options or type(layers[name]) is not kind:
            shown = {key: value for key, value in options.items() if key != GUARDED}
            steps.append(Step(f"{name}: {kind.__name__} {shown or ''}", becoming(layers[name], kind, options)))
            swapped.append(name)
    for name, layer in fusions.absorbed.items():
        module = net.get_submodule(name)
        stand_in = Absorbed(module, fusions.fused[layer].name, references(net, layers[layer]))
        steps.append(Step(f"{name}: computed by the layer before", replacing(net, module, stand_in)))
    for name, forward in fusions.forwards.items():
        steps.append(Step(f"{name or 'the network'}: calls fused layers", _generated(net.get_submodule(name), forward)))
    for name in sorted(fusions.paired):
        module = net.get_submodule(name)
        steps.append(Step(f"{name or 'the network'}: calls what stands side by side at once", _paired(module)))
    original = copy_of(net)
    plan = Plan(net, steps, lambda: _verify(original, net, given, seeds), skipped=skipped | fusions.refused)
    taking = fusions.fused.keys() | fusions.sums | fusions.joined | fusions.convolved | fusions.before | fusions.pooled
    told = {name: fusions.told(name) for name in layers if name in taking}
    swapped = [name for name in swapped if name not in told]
    convolved = tuple(name for name in layers if name in fusions.convolved)
    return plan, Acceleration(told, tuple(swapped), skipped, fusions.refused, convolved=convolved)


def _inside(net: nn.Module, layers: dict[str, Any], example: Example) -> dict[str, Activation | str | None]:
    """For each layer of another class: the activation in its forward, None for none, or why it is left alone."""
    others = {n: m for n, m in layers.items() if not is_plain(m) and not isinstance(m, foreign.ForeignBatchNorm)}
    if not others:
        return {}
    twin = copy_of(net, training=False)
    found = opened(twin, example)
    inside: dict[str, Activation | str | None] = {}
    for name, layer in others.items():
        kind = type(layer).__qualname__
        if name not in found:
            inside[name] = f"is a {kind}, whose forward cannot be followed"
            continue
        only = _only_activation(found[name])
        if isinstance(only, str):
            inside[name] = f"is a {kind}, {only}"
        elif isinstance(made := foreign.counterpart(layer), str):
            inside[name] = f"is a {kind}, which {made}"
        else:
            inside[name] = only
    return inside


def _only_activation(module: nn.Module) -> Activation | str | None:
    """The activation that alone follows the normalization in a layer's opened forward; None for none; else why not."""
    assert isinstance(module, fx.GraphModule)
    (node,) = [n for n in module.graph.nodes if n.op == "call_module" and n.target == NORM]
    if node.args[0].op != "placeholder":
        return "whose forward changes the input of the normalization"
    found: Activation | None = None
    while True:
        if len(node.users) != 1:
            return "whose forward reads the normalized values twice"
        (node,) = node.users
        if node.op == "output":
            return found if len(node.all_input_nodes) == 1 else "whose forward returns more than one value"
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, nn.Identity) or (isinstance(called, nn.modules.dropout._DropoutNd) and not called.p):
            continue
        after = _activation(module, node)
        if found is not None or after is None:
            what = type(called).__name__ if called is not None else f"a call of {operation(node)}"
            return f"whose forward has {what} behind the normalization, which our layers do not fuse"
        found = after


@dataclass
class Edits:
    """What was fused, by the qualified names of layers.

    Attributes:
        fused: the activation that each layer takes in.
        taken: the layers that can take in no more.
        sums: the layers that take an addition in.
        joined: the layers that read the parts of a concatenation.
        convolved: the layers that take in the depthwise convolution before them.
        before: those that are computed with the depthwise convolution behind them.
        pooled: those that are computed with the pooling behind them.
    """

    fused: dict[str, Activation] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    sums: set[str] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)
    convolved: set[str] = field(default_factory=set)
    before: set[str] = field(default_factory=set)
    pooled: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def common(self, other: Edits) -> Edits:
        """What may be fused in two forwards of which each could take in these: layers that would take the same."""
        alike = {
            name
            for name in self.taken & other.taken
            if self.fused.get(name) == other.fused.get(name) and (name in self.sums) == (name in other.sums)
        }
        return Edits(taken=alike, joined=self.joined & other.joined)


@dataclass(kw_only=True)
class Fusions(Edits):
    """The patterns that were found, by qualified names.

    Attributes:
        net: the network.
        candidates: batch normalization layers that may be changed.
        inside: the activation in the forward of each layer of another class, or None.
        absorbed: activation modules that get a stand-in, and the layer that computes each.
        forwards: new forwards of modules.
        paired: containers that compute at once what stands in them one behind the other.
        refused: modules whose forward could not be generated anew although there is something to fuse, and why.
        draws: whether the forward of some module draws random numbers itself.
    """

    net: nn.Module
    candidates: Any
    inside: dict[str, Any] = field(default_factory=dict)
    absorbed: dict[str, str] = field(default_factory=dict)
    forwards: dict[str, Callable[..., Any]] = field(default_factory=dict)
    paired: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    draws: bool = False

    def find(self, example: Example) -> None:
        self.fused |= {name: activation for name, activation in self.inside.items() if activation is not None}
        self.taken |= self.fused.keys()
        base = copy_of(self.net)
        for name in self.inside:
            layer = base.get_submodule(name)
            foreign.adopt(layer, foreign.class_for(type(layer), "fused"))
        flows = self.flows(base, example)
        runs = Runs.of(self.net, example)
        self.draws = bool(runs.drawing) or any(flow.draws for flow in flows)
        free = {name for name in self.candidates if self.is_free(name, flows, runs)}
        for name in sorted(free - self.taken):
            self.absorb(name, flows, runs)
        self.absorb_in_order(free, runs)
        inputs = _inputs(self.net, example)
        names = {id(module): name for name, module in self.net.named_modules()}
        for name, module in reversed(list(self.net.named_modules())):
            if name in inputs and name in runs.changing and free - self.taken:
                self.refused[name] = _CHANGES
            elif name in inputs and name not in runs.changing:
                self.rewrite(name, module, inputs[name], {layer for layer in free if runs.as_often(layer, name)}, names)
        self.pair(names)

    def pair(self, names: dict[int, str]) -> None:
        """What can be computed at once in containers that call one module after the other."""
        is_ours = self.is_candidate(names)
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                groups = containers.groups_of(module, is_ours, lambda each: names.get(id(each)) in self.absorbed)
                found = [g for g in groups if g.norm is not None or g.pool is not None]
                if found and not has_hooks(module):
                    self.paired.add(name)
                for group in found if name in self.paired else ():
                    if group.norm is not None:
                        self.convolved.add(names[id(group.norm)])
                    if group.layer is not None:
                        (self.before if group.norm is not None else self.pooled).add(names[id(group.layer)])

    def flows(self, base: nn.Module, example: Example) -> list[DataFlow]:
        """The network's data flow in evaluation and in training mode, as far as it can be captured."""
        found = []
        for mode in (False, True):
            try:
                found.append(capture(copy_of(base, training=mode), example))
            except SurgeryError as error:
                self.refused[""] = f"in {'training' if mode else 'evaluation'} mode {error}"
        return found

    def is_free(self, name: str, flows: list[DataFlow], runs: Runs) -> bool:
        """Whether the layer may take something in: it is called once, or once by each call of one module.

        Nobody may see its output from outside.
        """
        layer = self.net.get_submodule(name)
        again = not runs.once(name)
        if getattr(layer, "activation", None) is not None or (again and not runs.in_step(name)):
            return False
        if flows:
            return not any(flow.calls(name) or not flow.draws for flow in flows if obstacle(flow, name, again))
        return is_plain(layer) and obstacle_outside(self.net, layer) is None

    def absorb(self, name: str, flows: list[DataFlow], runs: Runs) -> None:
        """An activation module right after the layer, in both modes.

        Where random numbers shape a mode's flow, it is one draw: then no module may draw any that calls either.
        """
        called = [flow for flow in flows if len(flow.calls(name)) == 1]
        if len(called) < 2:
            return
        found = {activations.following(flow, flow.calls(name)[0]) for flow in called}
        (after, *others) = found
        if others or not isinstance(after, tuple):
            return
        above = {*_above(name), *_above(after[0])}
        changing = sorted(runs.changing & above)
        if changing:
            self.refused |= dict.fromkeys(changing, _CHANGES)
            return
        if any(flow.draws for flow in flows) and runs.drawing & above:
            return
        self.take_in(name, *after)

    def absorb_in_order(self, free: set[str], runs: Runs) -> None:
        """An activation module behind the layer in a ``Sequential`` that calls both as often as it is called."""
        for name, module in self.net.named_modules():
            if type(module).forward is not nn.Sequential.forward or has_hooks(module):
                continue
            keys = [f"{name}.{key}".lstrip(".") for key in module._modules]
            for layer, after in pairwise(keys):
                activation = activations.of_module(self.net.get_submodule(after))
                if (
                    activation is not None
                    and layer in free - self.taken
                    and after not in self.absorbed
                    and obstacle_outside(self.net, self.net.get_submodule(after)) is None
                    and runs.together(layer, after, name)
                ):
                    self.take_in(layer, after, activation)

    def take_in(self, layer: str, after: str, activation: Activation) -> None:
        self.fused[layer] = activation
        self.absorbed[after] = layer
        self.taken.add(layer)

    def told(self, name: str) -> str:
        """What a layer computes besides its normalization, in words."""
        activation = self.fused.get(name)
        parts = (
            ["a concatenation"] * (name in self.joined)
            + ["a depthwise convolution"] * (name in self.convolved)
            + ["an addition"] * (name in self.sums)
            + ([] if activation is None else [activation.name])
            + ["the depthwise convolution behind it"] * (name in self.before)
            + ["the pooling behind it"] * (name in self.pooled)
        )
        return " and ".join(parts)

    def rewrite(
        self, name: str, module: nn.Module, inputs: tuple[Any, Any], free: set[str], names: dict[int, str]
    ) -> None:
        """Additions and calls of activations in a module's own forward, which may be another one in training mode."""
        ways = Given.ways(module, inputs)
        errors = []
        for given in ways:
            try:
                graphs = _own_graphs(module, inputs, given)
                break
            except Exception as error:
                errors.append(error)
        else:
            if free - self.taken:
                first = (str(errors[-1]).strip().splitlines() or [""])[0]
                self.refused[name] = f"its forward cannot be captured by itself ({type(errors[-1]).__name__}: {first})"
            return
        if len(graphs) > 1 and _reads_modes_of_others(module, graphs, given):
            self.refused[name] = "its forward is another one by the modes of modules in it"
            return
        edits = [self.edited(module, graph, free, names) for graph in graphs]
        if edits[1:] and edits[0] != edits[1]:
            both = edits[0].common(edits[1])
            graphs = _own_graphs(module, inputs, given)
            edits = [self.edited(module, graph, free, names, both) for graph in graphs]
            if not edits[0] or edits[0] != edits[1]:
                self.refused[name] = "its forward is another one in training mode, where other things could be fused"
                return
        if not any(edits):
            return
        for what, found in vars(edits[0]).items():
            getattr(self, what).update(found)
        forward = _in_mode([type(fx.GraphModule(module, graph)).forward for graph in graphs])
        inside = [path for path, each in module.named_modules() if names.get(id(each)) in edits[0].fused]
        self.forwards[name] = forward if given is None else given.guarded(forward, inside)

    def edited(
        self, module: nn.Module, graph: fx.Graph, free: set[str], names: dict[int, str], only: Edits | None = None
    ) -> Edits:
        """Changes the graph of a module's own forward; what was fused there, by the layers' names in the network.

        Nothing but ``only``, if that is given.
        """
        edits = Edits()
        if only is not None:
            free = free & only.taken

        def is_left_out(node: fx.Node, found: str) -> bool:
            layer = names[id(module.get_submodule(str(node.target)))]
            return only is not None and layer not in getattr(only, found)

        found = {}
        for node in list(graph.nodes):
            layer = names.get(id(module.get_submodule(str(node.target)))) if node.op == "call_module" else None
            if layer in free - self.taken and _pattern(module, node) is not None:
                found[layer] = node
        is_ours = self.is_candidate(names)
        joined = [n for n in concatenations.readers(module, graph, is_ours) if not is_left_out(n, "joined")]
        convolved = [n for n in depthwise.readers(module, graph, is_ours) if not self.lie_in_one(module, n, names)]
        pools = [] if only is not None else self.pools(module, graph, names, alone=True)
        if not found and not joined and not convolved and not pools:
            return edits
        for layer, node in found.items():
            pattern = None if node._erased else _pattern(module, node)  # another layer may have taken the addition
            if pattern is not None and pattern.replace(graph):
                edits.taken.add(layer)
                if pattern.activation is not None:
                    edits.fused[layer] = pattern.activation
                if pattern.residual is not None:
                    edits.sums.add(layer)
        for node in set(joined) - set(found.values()):
            edits.joined.add(names[id(module.get_submodule(str(node.target)))])
            concatenations.hand_in_parts(graph, node)
        self.take_in_convolutions(module, graph, names, edits)
        while only is None:
            pools = self.pools(module, graph, names)  # anew, since one may be the input of the next
            if not pools:
                break
            node, conv, before = pools[0]
            edits.pooled.add(names[id(module.get_submodule(before.layer))])
            pooling.fuse(graph, node, conv, before)
        computing = ("call_function", "get_attr", "call_method")
        graph.eliminate_dead_code(lambda node: node.op not in computing or chains.writes(node))
        graph.lint()
        return edits

    def is_candidate(self, names: dict[int, str]) -> Callable[[Any], bool]:
        return lambda module: names.get(id(module)) in self.candidates

    def take_in_convolutions(self, module: nn.Module, graph: fx.Graph, names: dict[int, str], edits: Edits) -> None:
        """The depthwise convolutions before layers, also where an activation behind the layer is a call."""
        is_ours = self.is_candidate(names)

        def take(node: fx.Node, conv: Any, layer: str, activation: Sequence[Any] = ()) -> None:
            before = self.found_before(module, conv, names)
            if before is not None and not chains.nothing_is_written(graph, before.nodes[-1], node):
                before = None
            if not chains.nothing_is_written(graph, conv, node):
                return
            edits.convolved.add(names[id(module.get_submodule(layer))])
            if before is not None:
                edits.before.add(names[id(module.get_submodule(before.layer))])
            depthwise.fuse(graph, node, conv, layer, tuple(activation), before)

        for node in depthwise.readers(module, graph, is_ours):
            take(node, node.args[0], str(node.target))
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is normalized:
                layer, conv, residual, *activation = node.args
                if residual is None and depthwise.reads_depthwise(module, conv):
                    take(node, conv, str(layer.target), activation)

    def pools(
        self, module: nn.Module, graph: fx.Graph, names: dict[int, str], alone: bool = False
    ) -> list[tuple[fx.Node, fx.Node | None, chains.Found]]:
        """Poolings of what a layer alone computes, perhaps behind a 1x1 convolution.

        With ``alone`` those that no container can compute itself.
        """
        found = []
        for node in graph.nodes:
            if not chains.is_call_of(module, node, pooling.is_pooling):
                continue
            conv = pooling.convolution_before(module, node)
            before = self.found_before(module, node if conv is None else conv, names)
            if before is not None and chains.nothing_is_written(graph, before.nodes[-1], node):
                called = [str(node.target), *([] if conv is None else [str(conv.target)]), before.layer]
                if not (alone and _lie_in_one(module, [*called, *before.stand_ins])):
                    found.append((node, conv, before))
        return found

    def lie_in_one(self, module: nn.Module, node: fx.Node, names: dict[int, str]) -> bool:
        """Whether a layer, the convolution before it and what comes before that lie in one container.

        It can call them at once itself.
        """
        conv: Any = node.args[0]
        before = self.found_before(module, conv, names)
        called = [str(node.target), str(conv.target)] + ([] if before is None else [before.layer, *before.stand_ins])
        return _lie_in_one(module, called)

    def found_before(self, module: nn.Module, node: fx.Node, names: dict[int, str]) -> chains.Found | None:
        """The batch normalization, with its activation, whose output a call alone reads."""

        def is_absorbed(name: str) -> bool:
            return names.get(id(module.get_submodule(name))) in self.absorbed

        return chains.found_before(module, node.args[0], self.is_candidate(names), is_absorbed, normalized)


def _lie_in_one(module: nn.Module, names: list[str]) -> bool:
    """Whether modules of these names lie in one container."""
    above = {name.rpartition(".")[0] for name in names}
    return len(above) == 1 and isinstance(module.get_submodule(above.pop()), nn.Sequential)


def _above(name: str) -> Iterator[str]:
    """The names of the modules that a module lies in."""
    while name:
        name = name.rpartition(".")[0]
        yield name


@dataclass(frozen=True)
class Pattern:
    """activation(norm(x) + residual) in a graph: the nodes from the layer's call to the last one.

    Without a residual the activation may stand behind another shape or order of the normalized values.
    """

    norm: fx.Node
    last: fx.Node
    residual: fx.Node | None
    activation: Activation | None
    moved: fx.Node | None = None

    def replace(self, graph: fx.Graph) -> bool:
        nodes, chain = list(graph.nodes), self.chain()
        between = nodes[nodes.index(self.norm) : nodes.index(self.last)]
        if self.norm.args[1:] or self.norm.kwargs or any(chains.writes(node) for node in between if node not in chain):
            return False  # it takes more already, or would read what has been overwritten
        activation = self.activation or Activation("")
        with graph.inserting_before(self.last if self.moved is None else self.norm):
            layer = graph.get_attr(str(self.norm.target))
            args = (layer, self.norm.args[0], self.residual, activation.name, activation.slope)
            fused = graph.call_function(normalized, args)
        if self.moved is not None:
            fused.meta.update(self.norm.meta)
            self.last.replace_all_uses_with(self.moved)
            self.norm.replace_all_uses_with(fused)
            chain = [self.last, self.norm]
        else:
            fused.meta.update(self.last.meta)
            self.last.replace_all_uses_with(fused)
        for node in chain:
            graph.erase_node(node)
        return True

    def chain(self) -> list[fx.Node]:
        """The nodes from the last one back to the layer's call."""
        nodes = [self.last]
        while nodes[-1] is not self.norm:
            nodes.append(next(n for n in nodes[-1].all_input_nodes if n is not self.residual))
        return nodes


def normalized(layer: Any, x: Tensor, residual: Tensor | None, activation: str, slope: float) -> Tensor:
    """activation(layer(x) + residual), all of it by the layer if it is still ours; a plain one may stand there now."""
    if activations.is_computed_by(layer, activation) or (residual is not None and isinstance(layer, AddActivation)):
        fused: Tensor = layer(x) if residual is None else layer(x, residual=residual)
        return fused
    y: Tensor = layer(x)
    if residual is not None:
        y = y + residual
    return aten.activate(y, activation or "identity", slope)


def _pattern(module: nn.Module, node: fx.Node) -> Pattern | None:
    """What follows a layer in a module's own graph and can be fused into it."""
    last, residual = node, None
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.op in ("call_function", "call_method") and operation(user) == "add":
        residual = _other(user, node)
        if residual is None or residual.meta.get("shape") != node.meta.get("shape"):
            return None
        changed = user.args[0] if chains.writes(user) else node
        if changed is residual and (residual.op == "placeholder" or len(residual.users) > 1):
            return None  # somebody else sees the sum that is written into it
        last = user
    moved = None
    while residual is None and len(last.users) == 1 and activations.is_rearrangement(next(iter(last.users)), last):
        (last,) = last.users
        moved = last
    activation = None
    if len(last.users) == 1:
        (user,) = last.users
        activation = _activation(module, user)
        last = user if activation is not None else last
    if last is node or last is moved:
        return None
    return Pattern(node, last, residual, activation, moved)


def _other(add: fx.Node, node: fx.Node) -> fx.Node | None:
    operands = add.args
    if len(operands) != 2 or add.kwargs or not all(isinstance(x, fx.Node) for x in operands):
        return None
    (other,) = [x for x in operands if x is not node] or [None]
    return other if isinstance(other, fx.Node) else None


def _activation(module: nn.Module, node: fx.Node) -> Activation | None:
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return None if has_hooks(called) else activations.of_module(called)
    return activations.of_call(node)


class _OwnTracer(Follower):
    """Follows a module's own forward, and plain containers in it; every other module is one call.

    A call of ``len`` on a tensor is recorded, too: Python's own would ask the tracer for a number.
    """

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with contextlib.ExitStack() as stack:
            for names in {id(g): g for g in map(_globals_of_forward, root.modules()) if g is not None}.values():
                if "len" not in names:
                    names["len"] = _recorded_len
                    stack.callback(names.pop, "len", None)
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).forward is not nn.Sequential.forward or has_hooks(m)


def _recorded_len(value: Any) -> Any:
    """``len``, as a node of the graph where a tensor is asked."""
    if not isinstance(value, fx.Proxy):
        return len(value)
    return value.tracer.create_proxy("call_function", len, (value,), {})


def _globals_of_forward(module: nn.Module) -> dict[str, Any] | None:
    """The names that a forward out of a user's or a library's file looks up; None for torch's own."""
    forward = type(module).forward
    names = getattr(getattr(forward, "of", forward), "__globals__", None)
    own = names is None or str(names.get("__name__", "")).partition(".")[0] in ("torch", "batchnorm")
    return None if own else names


def _own_graphs(module: nn.Module, inputs: tuple[Any, Any], given: Given | None = None) -> list[fx.Graph]:
    """The graph of a module's own forward with shapes, or those in evaluation and training mode where they differ."""
    if given is not None:
        inputs = (given.tensors_in(inputs), {})
    graphs = [_own_graph(module, mode, given) for mode in (False, True)]
    if str(graphs[0]) == str(graphs[1]):
        del graphs[1]
    for graph, mode in zip(graphs, (False, True), strict=False):
        _record(module, graph, inputs, mode)
    return graphs


def _reads_modes_of_others(module: nn.Module, graphs: Sequence[fx.Graph], given: Given | None) -> bool:
    """Whether the graphs in evaluation and in training mode differ by more than the mode of the module itself."""
    return any(
        str(_own_graph(module, mode, given, others=not mode)) != str(graph)
        for mode, graph in zip((False, True), graphs, strict=True)
    )


def _own_graph(module: nn.Module, training: bool, given: Given | None = None, others: bool | None = None) -> fx.Graph:
    """In a mode; ``others``: that of the modules in it, if it is another one."""
    twin = copy_of(module, training=training if others is None else others)
    twin.training = training
    if given is not None:
        given.bind(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return traced_without_draws(_OwnTracer(), twin)


_FIXED = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Given:
    """A forward some of whose arguments are numbers, words or None, by which it decides what to do.

    Attributes:
        original: the forward.
        names: of its parameters but ``self``.
        tensors: those that were given tensors.
        fixed: the values of all others.
        defaults: what they are where nobody gives them.
    """

    original: Callable[..., Any]
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    fixed: dict[str, Any]
    defaults: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, inputs: tuple[Any, Any]) -> Given | None:
        """What a module was given on the example; None if all are tensors that must be, or some are something else."""
        original = type(module).forward
        parameters = list(inspect.signature(original).parameters.values())[1:]
        if any(each.kind is not each.POSITIONAL_OR_KEYWORD or not each.name.isidentifier() for each in parameters):
            return None
        names = tuple(each.name for each in parameters)
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        values = defaults | dict(zip(names, inputs[0], strict=False)) | inputs[1]
        tensors = tuple(name for name in names if isinstance(values.get(name), Tensor))
        fixed = {name: values[name] for name in names if name in values and name not in tensors}
        is_known = values.keys() == set(names) and all(type(value) in _FIXED for value in fixed.values())
        decides = bool(fixed) or any(name in defaults for name in tensors)
        return cls(original, names, tensors, fixed, defaults) if is_known and decides and tensors else None

    @classmethod
    def ways(cls, module: nn.Module, inputs: tuple[Any, Any]) -> list[Given | None]:
        """How to capture a forward, the first way first: for the values of the example, or for any (None).

        What says yes or no, or is None, rarely is anything but a decision, which a capture of any values may not see.
        """
        given = cls.of(module, inputs)
        if given is None:
            return [None]
        decides = any(type(value) not in (int, float) for value in given.fixed.values())
        may_be_absent = any(name in given.defaults for name in given.tensors)
        return [given] if decides or may_be_absent else [None, given]

    def tensors_in(self, inputs: tuple[Any, Any]) -> tuple[Any, ...]:
        values = dict(zip(self.names, inputs[0], strict=False)) | inputs[1]
        return tuple(values[name] for name in self.tensors)

    def bind(self, module: nn.Module) -> None:
        """Gives a module a class whose forward takes the tensors alone, by their names, which torch.fx reads."""
        space: dict[str, Any] = {"original": self.original, "fixed": self.fixed}
        passed = ", ".join(f"{name}={name}" for name in self.tensors)
        exec(f"def forward(self, {', '.join(self.tensors)}): return original(self, {passed}, **fixed)", space)
        space["forward"].of = self.original
        module.__class__ = type(type(module).__name__, (type(module),), {"forward": space["forward"]})

    def guarded(self, forward: Callable[..., Any], inside: Sequence[str]) -> Callable[..., Any]:
        """A forward of all arguments, which is the given one where the fixed ones are what they were.

        Else it is the original one. That activates itself, so the layers ``inside`` do so no more from the first such
        call on, which the given forward heeds. Nothing is put back: a checkpoint may call the original again in the
        backward, and another thread meanwhile.
        """

        def guarded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            passed = dict(zip(self.names, args, strict=False))
            values = self.defaults | passed | kwargs
            if len(args) == len(passed) and not passed.keys() & kwargs.keys() and values.keys() == set(self.names):
                fixed = all(type(values[k]) is type(v) and values[k] == v for k, v in self.fixed.items())
                if fixed and all(isinstance(values[name], Tensor) for name in self.tensors):
                    return forward(module, *[values[name] for name in self.tensors])
            for path in inside:
                layer: Any = module.get_submodule(path)
                if isinstance(layer, ours.BatchNorm) and layer.activation is not None:
                    layer.activation = None
            return self.original(module, *args, **kwargs)

        guarded.__name__ = "forward"
        vars(guarded)["__signature__"] = inspect.signature(self.original)
        return guarded


def _inputs(net: nn.Module, example: Example) -> dict[str, tuple[Any, Any]]:
    """What every module with a forward of its own that calls other modules is given on the example."""
    watched = copy_of(net, training=False)
    found: dict[str, tuple[Any, Any]] = {}
    for name, module in watched.named_modules():
        inner = any(True for _ in module.children())
        if inner and not is_leaf(module) and type(module).forward is not nn.Sequential.forward:
            module.register_forward_pre_hook(_noting(found, name), with_kwargs=True)
    run_example(watched, example)
    own = dict(net.named_modules())
    return {name: value for name, value in found.items() if not has_hooks(own[name])}


def _noting(found: dict[str, tuple[Any, Any]], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.setdefault(name, pytree.tree_map(lambda x: x, (args, kwargs)))  # lists may grow afterwards

    return note


class _ShapeRecorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = (value.shape, value.dtype) if isinstance(value, Tensor) else None
        return value


def _record(module: nn.Module, graph: fx.Graph, inputs: tuple[Any, Any], training: bool) -> None:
    """Note the shapes on the example in ``graph``; without them nothing is fused."""
    args, kwargs = copy.copy(inputs)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    values = list(args)
    for node in placeholders[len(values) :]:
        values.append(kwargs.get(str(node.target), node.args[0] if node.args else None))
    twin = copy_of(module, training=training)
    with random_state_kept(module), torch.no_grad():
        _ShapeRecorder(twin, graph=graph).run(*[x.clone() if isinstance(x, Tensor) else x for x in values])


def _in_mode(forwards: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """One forward of those in evaluation and in training mode, or of one that is the same in both."""
    if len(forwards) == 1:
        return forwards[0]
    evaluation, training = forwards

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return training(self, *args, **kwargs) if self.training else evaluation(self, *args, **kwargs)

    vars(forward)["__signature__"] = inspect.signature(evaluation)
    return forward


def _generated(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give the module a class of its own, a subclass of its class with another forward."""

    def do() -> None:
        kind = type(module)
        forward.__module__ = "accelerated"
        members = {
            "forward": forward,
            "original_kind": kind,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
            "__deepcopy__": _deepcopy,
            "__reduce_ex__": _no_pickle,
        }
        module.__class__ = type(f"Accelerated{kind.__name__}", (kind,), members)

    return do


def _paired(module: nn.Module) -> Callable[[], None]:
    """Let a container compute at once what stands in it one behind the other."""

    def do() -> None:
        module.__class__ = containers.in_pairs(type(module))

    return do


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = self.__new__(type(self))
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _no_pickle(self: nn.Module, protocol: int) -> Any:
    kind = vars(type(self))["original_kind"]
    raise SurgeryError(
        f"an accelerated {kind.__name__} has a generated forward and cannot be pickled; "
        "save its state_dict, or bn.revert(net) first"
    )


def _no_class(layer: nn.Module) -> str | None:
    return None if our_class(layer) is not None else "is a SyncBatchNorm; convert it first"


def _verify(original: nn.Module, net: nn.Module, example: Example, seeds: Sequence[int] = (0,)) -> None:
    """Evaluation mode in the network's dtype; both modes in float64, with gradients, for each seed."""
    before, after = copy_of(original, training=False), copy_of(net, training=False)
    own = Rounding(before, example)
    tolerance = TOLERANCE[own.dtype]
    limits = [own.limit(d, tolerance) for d in own.compare(after, tolerance, "accelerate", " in evaluation mode")]
    kind = torch.float64 if own.truth is not None else own.dtype
    limit = 100 * max(limits, default=tolerance) if own.truth is None or own.narrows else _EXACT
    for seed in seeds:
        _verify_training(original, net, example.to(kind), kind, limit, seed)


def _verify_training(
    original: nn.Module, net: nn.Module, example: Example, kind: torch.dtype, limit: float, seed: int
) -> None:
    """One step of both networks from the same random state."""
    both = [copy_of(n) if kind != torch.float64 else copy_of(n).double() for n in (original, net)]
    outputs, states = zip(*[_trained(n, example, seed) for n in both], strict=True)
    differences = distances(*outputs)
    if _agree(differences, states, limit):
        return
    # As far apart as the original and itself with other last bits: the mode of training may multiply rounding.
    trials = [_trained(trembling(copy_of(original).to(kind), k), example, seed) for k in range(_TRIALS)]
    moves: dict[str, float] = {}
    for output, _ in trials:
        for d in distances(outputs[0], output):
            moves[d.output] = max(d.relative, moves.get(d.output, 0.0))
    for d in differences:
        if not d.relative <= max(limit, 4 * moves[d.output]):
            raise SurgeryError(
                f"accelerate: {d.output} in training mode differs by {d.relative:.1e} of its largest value (accepted "
                f"{max(limit, 4 * moves[d.output]):.0e}); nothing was changed. Other last bits of the original's own "
                f"layers move it by {moves[d.output]:.1e} in this mode."
            )
    _compare_states(states[0], states[1], limit, [state for _, state in trials])


def _agree(differences: list[Distance], states: Sequence[dict[str, Tensor]], limit: float) -> bool:
    """Whether outputs and states in training mode agree without a look at the original's own rounding."""
    if not all(d.relative <= limit for d in differences):
        return False
    try:
        _compare_states(states[0], states[1], limit, [])
    except SurgeryError:
        return False
    return True


def _trained(net: nn.Module, example: Example, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """Output, gradients and buffers after one forward and backward in training mode, the randomness that of a seed."""
    net.train()
    given = example.map(lambda x: x.detach().clone())
    with random_state_kept(net), torch.enable_grad():
        seed_all(seed)
        try:
            output = net(*given.args, **given.kwargs)
            detached = Example.of((output,)).map(lambda x: x.detach().clone()).args[0]
            # Now, as recomputation in the backward may change them again.
            buffers = {key: buffer.clone() for key, buffer in net.named_buffers()}
            torch.manual_seed(seed + 1)
            losses = [(x * foreign.random_like(x)).sum() for x in _differentiable(output)]
            if losses:
                torch.stack(losses).sum().backward()
        except Exception as error:
            raise InputError(
                f"accelerate: the network fails on the example in training mode ({example.describe()}): {error}. "
                "Give a batch that it can be trained on."
            ) from error
    state = {f"the gradient of {k}": p.grad for k, p in net.named_parameters() if p.grad is not None}
    return detached, state | buffers


def _differentiable(output: Any) -> Iterator[Tensor]:
    leaves = pytree.tree_leaves(output)
    return (x for x in leaves if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point())


def _compare_states(
    before: dict[str, Tensor], after: dict[str, Tensor], limit: float, moved: Sequence[dict[str, Tensor]]
) -> None:
    """Gradients and buffers of both networks; ``moved``: those of the original with other last bits."""
    names = [name for name in before if not name.endswith("num_batches_skipped")]
    if set(names) - after.keys():
        raise SurgeryError(f"accelerate: {sorted(set(names) - after.keys())} got lost; nothing was changed")
    largest = max((float(before[n].double().abs().max()) for n in names if before[n].numel()), default=0.0)
    for name in names:
        x, y = before[name].double(), after[name].double()
        if not x.numel():
            continue
        accepted = limit * max(float(x.abs().max()), 1e3 * limit * largest)
        for state in moved:
            if name in state:
                accepted = max(accepted, 4 * float((state[name].double() - x).abs().max()))
        if not float((x - y).abs().max()) <= accepted:
            raise SurgeryError(
                f"accelerate: {name} in training mode differs by {float((x - y).abs().max()):.1e} (accepted "
                f"{accepted:.0e}); nothing was changed"
            )
