"""Insertion of batch normalization into networks that have none."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from batchnorm.errors import BatchNormError, InputError, SurgeryError
from batchnorm.nn.batch_norm import BY_RANK
from batchnorm.nn.outside import NORM, followed_by_norm
from batchnorm.surgery.capture import NotCapturedError, capture_settled
from batchnorm.surgery.comparison import Example, copy_of, distances, run_example
from batchnorm.surgery.flow import DataFlow, data_inputs, operation, rank
from batchnorm.surgery.folding import uses_batch_statistics
from batchnorm.surgery.layers import LastAxisBatchNorm
from batchnorm.surgery.modules import obstacle, unwrap
from batchnorm.surgery.parts import Part, parts_of
from batchnorm.surgery.plan import Plan, Step, replace_module
from batchnorm.surgery.roles import (
    is_activation,
    is_attention,
    is_layer,
    is_normalization,
    is_normalized,
    is_output_layer,
    is_weighted,
    reach,
)

PLACEMENTS = ("before_activation", "after_activation")
INITIALIZATIONS = ("standard", "preserve")


class NothingToInsertError(SurgeryError):
    """A network without a layer that could be normalized, or whose layers all are.

    Attributes:
        skipped: why each layer was left out, by name.
    """

    def __init__(self, message: str, skipped: dict[str, str]) -> None:
        super().__init__(message)
        self.skipped = skipped


def insert(
    net: nn.Module,
    example: Any,
    *,
    placement: str = "before_activation",
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = (),
    optimizer: Optimizer | None = None,
    initialize: str = "standard",
    zero_gamma: bool = False,
    **layer_options: Any,
) -> nn.Module:
    """Put batch normalization after the linear and convolution layers of ``net``, in place.

    By default after each one and before its activation (Ioffe & Szegedy 2015, section 3.2), but
    not after output layers (no layer with weights follows), not where the result is normalized
    before the next layer with weights, and not in attention and gates. A bias that batch
    normalization directly follows has no effect in training, and is removed.

    A layer ``conv`` becomes ``Sequential(conv=conv, norm=BatchNorm2d(...))`` in its place, so the
    ``state_dict`` keys of all other modules stay: ``features.3.weight`` becomes
    ``features.3.conv.weight``, and ``features.3.norm.*`` is new. After an activation module it is
    the activation that is so wrapped. A module whose attributes the network reads when it runs (``self.conv.stride``)
    stays where it is: the new layer is its child ``norm``, called by a hook behind it, and ``conv.weight`` keeps its
    key.

    In a network that cannot be captured as a whole, because it looks into its data, layers are found in those modules
    that can be captured by themselves, if nothing outside one calls or reads what is in it. A layer whose value leaves
    such a module before the next layer with weights is left alone; ``only`` names it.

    Args:
        net: the network; it is changed and returned.
        example: an input: a tensor, a tuple of positional or a mapping of keyword arguments.
        placement: ``"before_activation"`` or ``"after_activation"``; a layer without an activation
            is normalized directly in both.
        only: names or patterns (``"features.*"``) of the layers to normalize, whatever their role.
        skip: names or patterns of the layers to leave alone.
        optimizer: kept in step: the new parameters join the parameter group of their layer's
            weight; removed biases leave it.
        initialize: ``"standard"`` (gamma 1, beta 0) or ``"preserve"``: gamma and beta undo the normalization, so that
            in evaluation mode the network still computes the same function. The statistics are measured on the
            example (running variance *unbiased*), ``gamma = sqrt(var + eps)`` and ``beta = mean`` (Ioffe & Szegedy
            2015, section 3).
        zero_gamma: set gamma to 0 where the new layer ends the longer branch of an addition, so that residual blocks
            begin as their shortcut (Goyal et al. 2017, section 5.1).
        layer_options: arguments of the new layers, as ``eps=1e-3, momentum=0.05``.

    Returns:
        The network.

    Raises:
        InputError: for an unknown name, placement or option, or an example that ``net`` cannot take.
        SurgeryError: when a layer cannot be normalized (it is shared, has hooks, its activation is
            a call and not a module, ...; ``skip`` it), nothing is left to normalize, or the result
            does not pass the check. ``net`` and ``optimizer`` are then as they were.

    Source: Ioffe & Szegedy 2015, section 3.2; Goyal et al. 2017, section 5.1 (``zero_gamma``).

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [type(layer).__name__ for layer in insert(net, torch.randn(8, 3))]
        ['Sequential', 'ReLU', 'Linear']
        >>> net[0].norm.num_features
        4
    """
    plan_insertion(
        net,
        example,
        placement=placement,
        only=only,
        skip=skip,
        optimizer=optimizer,
        initialize=initialize,
        zero_gamma=zero_gamma,
        **layer_options,
    ).apply()
    return net


def plan_insertion(
    net: nn.Module,
    example: Any,
    *,
    placement: str = "before_activation",
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = (),
    optimizer: Optimizer | None = None,
    initialize: str = "standard",
    zero_gamma: bool = False,
    **layer_options: Any,
) -> Plan:
    """What ``insert`` would do, as a plan to read (``print(plan)``) and to ``apply``."""
    net = unwrap(net, "insert")
    if placement not in PLACEMENTS:
        raise InputError(f"insert: placement is {placement!r}, expected one of {PLACEMENTS}")
    if initialize not in INITIALIZATIONS:
        raise InputError(f"insert: initialize is {initialize!r}, expected one of {INITIALIZATIONS}")
    if zero_gamma and initialize == "preserve":
        raise InputError("insert: zero_gamma=True changes the function, which initialize='preserve' keeps; give one")
    given = Example.of(example)
    layers = [name for name, module in net.named_modules() if is_layer(module)]
    chosen = None if only is None else _matching(only, layers, "only")
    left_out = _matching(skip, layers, "skip")
    parts, outside = _parts(net, given)
    insertions: list[Insertion] = []
    skipped: dict[str, str] = {}
    impossible: dict[str, str] = {}
    for name in layers:
        part = next((each for each in parts if each.holds(name)), None)
        reason = _outside(name, chosen, left_out, outside) if part is None else _unwanted(part, name, chosen, left_out)
        if reason is not None:
            skipped[name] = reason
            continue
        outcome = outside[name] if part is None else _insertion(part, name, placement, layer_options)
        if isinstance(outcome, str):
            impossible[name] = outcome
        else:
            insertions.append(outcome)
    if impossible:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in impossible.items())
        raise SurgeryError(f"insert: {reasons}. Mend this, or leave it out with skip={[*impossible]}")
    if not insertions:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in skipped.items())
        message = f"insert: nothing to normalize ({reasons or 'no linear or convolution layer'})"
        raise NothingToInsertError(message, skipped)
    placed = _placed(net, insertions, given)
    if isinstance(placed, str):
        raise SurgeryError(f"insert: {placed}")
    insertions = placed
    original = copy_of(net, training=False)
    steps = [step for item in insertions for step in item.steps(net, optimizer)]
    if zero_gamma:
        steps += [Step(f"{item.after}: gamma 0", _zeroing(item)) for item in insertions if _ends_branch(item)]
    if initialize == "preserve":
        measured = _measured(original, insertions, given)
        steps += [Step(f"{i.after}: gamma and beta undo it", _undoing(i, *measured[i.after])) for i in insertions]

    def verify() -> None:
        _verify(original, net, insertions, parts, given)
        if initialize == "preserve":
            _verify_preserved(original, net, given)

    return Plan(net, steps, verify, optimizer, skipped)


@dataclass(frozen=True)
class Insertion:
    """One new layer: after the module ``after``, for the values of the layer ``name``, which ``node`` gives."""

    name: str
    layer: nn.Module
    after: str
    module: nn.Module
    norm: _BatchNorm
    flow: DataFlow
    node: fx.Node
    in_place: bool = False

    @property
    def direct(self) -> bool:
        return self.module is self.layer

    @property
    def key(self) -> str:
        """What the wrapped module is called inside the wrapper."""
        if not self.direct:
            return "activation"
        return "linear" if isinstance(self.layer, nn.Linear) else "conv"

    def wrapper(self) -> nn.Sequential:
        """The module and the new layer, to stand in the module's place."""
        made = nn.Sequential(OrderedDict([(self.key, self.module), (NORM, self.norm)]))
        made.training = self.module.training
        return made

    def steps(self, net: nn.Module, optimizer: Optimizer | None) -> list[Step]:
        do = _following(self.module, self.norm) if self.in_place else _wrapping(net, self.module, self.wrapper())
        steps = [Step(f"{self.after}: followed by {self.norm}", do)]
        bias = self.layer.bias if self.direct else None
        if bias is not None:
            steps.append(Step(f"{self.name}: bias removed", _no_bias(self.layer)))
        if optimizer is not None:
            dropped = [bias] if isinstance(bias, nn.Parameter) else []
            in_use = {id(p) for m in net.modules() for p in _others(m, self.layer)}
            dropped = [p for p in dropped if id(p) not in in_use]
            do = _joining(optimizer, self.layer.weight, [*self.norm.parameters()], dropped)
            steps.append(Step(f"{self.after}: the optimizer knows the new parameters", do))
        return steps


def _parts(net: nn.Module, example: Example) -> tuple[list[Part[DataFlow]], dict[str, str]]:
    """The flow of the network; those of its parts, where the whole cannot be captured, and why layers are in none.

    Raises:
        NotCapturedError: where no part of a network that cannot be captured has a layer.
    """
    try:
        return [Part("", example, capture_settled(net, example))], {}
    except NotCapturedError as error:
        whole = error

    def flow(name: str, given: Example, lent: frozenset[str]) -> DataFlow:
        return capture_settled(net.get_submodule(name), given)

    found = parts_of(net, example, is_layer, flow, whole)
    if not found.parts:
        told = found.told()
        raise SurgeryError(f"insert: {whole} Its parts do not help{f': {told}' if told else ''}.")
    layers = [name for name, module in net.named_modules() if is_layer(module)]
    outside = {name: found.reason(name) for name in layers if not any(part.holds(name) for part in found.parts)}
    return found.parts, outside


def _outside(name: str, chosen: set[str] | None, left_out: set[str], reasons: dict[str, str]) -> str | None:
    """Why a layer in no part that can be captured needs no batch normalization, or None where it is asked for."""
    if name in left_out:
        return "it is in skip"
    if chosen is not None:
        return None if name in chosen else "it is not in only"
    return reasons[name]


def _unwanted(part: Part[DataFlow], name: str, chosen: set[str] | None, left_out: set[str]) -> str | None:
    """Why a layer needs no batch normalization, or None."""
    if name in left_out:
        return "it is in skip"
    if chosen is not None:
        return None if name in chosen else "it is not in only"
    flow, name = part.plan, part.inner(name)
    calls = flow.calls(name)
    if not calls:
        return obstacle(flow, name)
    if part.name and any(_leaves(flow, call) for call in calls):
        return f"what its value goes to behind '{part.name}' is not known, since the network cannot be captured"
    roles = {
        "it is an output layer": is_output_layer,
        "it is normalized already": is_normalized,
        "it is part of attention or a gate": is_attention,
    }
    for reason, role in roles.items():
        if any(role(flow, call) for call in calls):
            return reason
    return None


def _leaves(flow: DataFlow, node: fx.Node) -> bool:
    """Whether a value reaches the output of a part by a way without a normalization and without weights."""

    def ends(n: fx.Node) -> bool:
        return is_normalization(flow, n) or is_weighted(flow, n)

    return any(n.op == "output" for n in reach(node, lambda n: list(n.users), ends))


def _insertion(part: Part[DataFlow], name: str, placement: str, options: dict[str, Any]) -> Insertion | str:
    """The new layer for one layer, or why there cannot be one."""
    flow, name = part.plan, part.inner(name)
    layer = flow.modules[name]
    reason = obstacle(flow, name)
    if reason is not None:
        return reason
    if layer is flow.net:
        return "it is the whole network; put it into a torch.nn.Sequential"
    call = flow.calls(name)[0]
    after = call
    if placement == "after_activation":
        outcome = _activation_of(flow, call)
        if isinstance(outcome, str):
            return outcome
        after = outcome or call
    if part.full(flow.name(after)) in part.lent:
        return (
            f"its activation '{part.full(flow.name(after))}' is also used outside '{part.name}'; give each layer one "
            "of its own or use placement='before_activation'"
        )
    norm = _norm_for(layer, after, options)
    if isinstance(norm, str):
        return norm
    module = flow.module(after)
    assert module is not None
    return Insertion(part.full(name), layer, part.full(flow.name(after)), module, norm, flow, after)


def _activation_of(flow: DataFlow, call: fx.Node) -> fx.Node | str | None:
    """The call of the layer's activation module, None where it has no activation."""
    activations = [user for user in call.users if is_activation(flow, user)]
    if not activations:
        return None
    if len(call.users) > 1:
        return "its output goes to an activation and elsewhere; use placement='before_activation'"
    (node,) = activations
    if flow.module(node) is None:
        return (
            f"its activation is {flow.describe(node)} inside forward; make it a module "
            "(torch.nn.ReLU, ...) or use placement='before_activation'"
        )
    reason = obstacle(flow, flow.name(node))
    return f"its activation '{flow.name(node)}': {reason}" if reason else node


def _norm_for(layer: nn.Module, node: fx.Node, options: dict[str, Any]) -> _BatchNorm | str:
    axes = rank(node)
    assert isinstance(layer, (nn.Linear, _ConvNd))
    features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if isinstance(layer, nn.Linear):
        if axes is None or axes < 2:
            return "on the example it gives one vector, which has no batch axis"
    elif axes != len(layer.kernel_size) + 2:
        return f"on the example it gives {axes} axes, so there is no batch axis"
    kind = _norm_class(layer, axes)
    placed = {"device": layer.weight.device, "dtype": layer.weight.dtype, **options}
    try:
        norm = kind(features, **placed)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"insert: {kind.__name__} cannot take {options}: {error}") from error
    return norm.train(layer.training)


def _norm_class(layer: nn.Linear | _ConvNd, axes: int) -> type[_BatchNorm]:
    if isinstance(layer, nn.Linear):
        return BY_RANK[1] if axes == 2 else LastAxisBatchNorm
    return BY_RANK[len(layer.kernel_size)]


def _ends_branch(item: Insertion) -> bool:
    """Whether its value goes, through nothing but identities and dropout, to an addition as its longer branch."""
    flow, node = item.flow, item.node
    while len(node.users) == 1:
        (user,) = node.users
        if user.op.startswith("call") and flow.module(user) is None and operation(user) == "add":
            lengths = {source: _depth(flow, source) for source in data_inputs(user)}
            return len(lengths) == 2 and all(lengths[node] > n for source, n in lengths.items() if source is not node)
        if not isinstance(flow.module(user), (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            return False
        node = user
    return False


def _depth(flow: DataFlow, node: fx.Node) -> int:
    """How many layers with weights there are before and at a node."""
    before = reach(node, data_inputs, lambda n: False)
    return sum(is_weighted(flow, n) for n in {node, *before})


def _zeroing(item: Insertion) -> Callable[[], None]:
    def do() -> None:
        if item.norm.weight is None:
            raise SurgeryError(f"insert: zero_gamma needs a gamma, but the layer after '{item.after}' has affine=False")
        nn.init.zeros_(item.norm.weight)

    return do


def _measured(
    original: nn.Module, insertions: list[Insertion], example: Example
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and unbiased variance of the values that each new layer will normalize, on the example, in float64."""
    watched, found = copy_of(original), dict[str, tuple[torch.Tensor, torch.Tensor]]()

    def noting(item: Insertion) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            axis = -1 if isinstance(item.norm, LastAxisBatchNorm) else 1
            values = output.detach().double().movedim(axis, 0).flatten(1)
            found[item.after] = values.mean(1), values.var(1, correction=min(1, values.shape[1] - 1))

        return note

    for item in insertions:
        watched.get_submodule(item.after).register_forward_hook(noting(item))
    run_example(watched, example)
    return found


def _undoing(item: Insertion, mean: torch.Tensor, var: torch.Tensor) -> Callable[[], None]:
    bias = item.layer.bias if item.direct else None
    dropped = bias.detach().double() if isinstance(bias, torch.Tensor) else torch.zeros_like(mean)

    def do() -> None:
        norm = item.norm
        if norm.weight is None or norm.bias is None or norm.running_mean is None or norm.running_var is None:
            raise SurgeryError(
                f"insert: initialize='preserve' needs gamma, beta and running statistics after '{item.after}'"
            )
        with torch.no_grad():
            norm.running_mean.copy_(mean - dropped)
            norm.running_var.copy_(var)
            norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean.double() + dropped)

    return do


def _verify_preserved(original: nn.Module, net: nn.Module, example: Example) -> None:
    for d in distances(run_example(original, example), run_example(copy_of(net, training=False), example)):
        if not d.relative <= 0.1 * _coarseness(net):
            raise SurgeryError(f"insert: {d.output} differs by {d.relative:.1e}: the layers are not undone")


def _matching(patterns: str | Iterable[str], names: list[str], argument: str) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise InputError(
                f"insert: {argument} names {pattern!r}, which is no linear or convolution layer "
                f"of this network; there are {names}"
            )
        found |= set(matches)
    return found


def _wrapping(net: nn.Module, module: nn.Module, wrapper: nn.Module) -> Callable[[], None]:
    return lambda: replace_module(net, module, wrapper)


def _following(module: nn.Module, norm: nn.Module) -> Callable[[], None]:
    def do() -> None:
        module.add_module(NORM, norm)
        module.register_forward_hook(followed_by_norm)

    return do


def _placed(net: nn.Module, insertions: list[Insertion], example: Example) -> list[Insertion] | str:
    """The insertions, those of modules that the network looks into in place; or why that cannot be."""
    read = _looked_into(net, [item.after for item in insertions], example)
    if not _runs_wrapped(net, [item for item in insertions if item.after not in read], example):
        read = {item.after for item in insertions}
    taken = [name for name in sorted(read) if hasattr(net.get_submodule(name), NORM)]
    if taken:
        return f"'{taken[0]}' has an attribute 'norm' already, and the network reads others of its attributes; skip it"
    return [replace(item, in_place=item.after in read) for item in insertions]


def _runs_wrapped(net: nn.Module, insertions: list[Insertion], example: Example) -> bool:
    """False where a forward fails with a ``Sequential`` in a module's place: it asks what the module is, say."""
    twin = copy_of(net, training=False)
    for item in insertions:
        module = twin.get_submodule(item.after)
        replace_module(twin, module, nn.Sequential(OrderedDict([(item.key, module)])))
    try:
        found = distances(example.run(copy_of(net, training=False)), example.run(twin))
    except Exception:  # whatever a forward of any class raises
        return False
    return all(d.relative <= 0.1 * _coarseness(net) for d in found)


def _looked_into(net: nn.Module, names: list[str], example: Example) -> set[str]:
    """The modules of which something is read while the network runs, other than by their own call."""
    watched, found, running = copy_of(net, training=False), set[str](), list[str]()

    def note(name: str) -> None:
        if running:
            found.add(name)

    for name in dict.fromkeys(names):
        module = watched.get_submodule(name)
        module.__class__ = _watching(type(module), partial(note, name))
    watched.register_forward_pre_hook(lambda module, args: running.append("forward"))
    watched.register_forward_hook(lambda module, args, output: running.clear())
    run_example(watched, example)
    return found


def _watching(kind: type[nn.Module], note: Callable[[], None]) -> type[nn.Module]:
    calls: list[None] = []  # that are running

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            calls.pop()

    def read(self: nn.Module, name: str) -> Any:
        if not calls and not name.startswith("__"):
            note()
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__call__": call, "__getattribute__": read, "__module__": kind.__module__})


def _no_bias(layer: nn.Module) -> Callable[[], None]:
    return lambda: layer.register_parameter("bias", None)


def _others(module: nn.Module, layer: nn.Module) -> list[nn.Parameter]:
    return [] if module is layer else list(module.parameters(recurse=False))


def _joining(
    optimizer: Optimizer, weight: Any, new: list[nn.Parameter], dropped: list[nn.Parameter]
) -> Callable[[], None]:
    def do() -> None:
        groups = optimizer.param_groups
        home = next((g for g in groups if any(p is weight for p in g["params"])), groups[0])
        home["params"].extend(new)
        for parameter in dropped:
            optimizer.state.pop(parameter, None)
            for group in groups:
                group["params"][:] = [p for p in group["params"] if p is not parameter]

    return do


def _verify(
    original: nn.Module,
    net: nn.Module,
    insertions: list[Insertion],
    parts: list[Part[DataFlow]],
    example: Example,
) -> None:
    """The new layers sit where they were planned, and made neutral give the original's output."""
    try:
        for part in parts:
            inside = [item for item in insertions if item.flow is part.plan]
            if inside:
                _check_places(capture_settled(part.within(net), part.example), inside)
        names = {id(module): name for name, module in net.named_modules()}
        neutral = copy_of(net, training=False)
        for item in insertions:
            norm = neutral.get_submodule(names[id(item.norm)])
            if not _neutralize(norm, item, original.get_submodule(item.name)):
                return
        expected, actual = run_example(original, example), run_example(neutral, example)
        for distance in distances(expected, actual):
            if not distance.relative <= 0.1 * _coarseness(net):
                raise SurgeryError(f"with neutral new layers {distance.output} differs by {distance.relative:.1e}")
    except BatchNormError as error:
        raise SurgeryError(
            f"insert: the edited network does not pass its check, nothing was changed: {error}"
        ) from error


def _check_places(flow: DataFlow, insertions: list[Insertion]) -> None:
    names = {id(module): name for name, module in flow.modules.items()}
    for item in insertions:
        calls = flow.calls(names[id(item.norm)])
        sources = data_inputs(calls[0]) if len(calls) == 1 else []
        if [flow.module(source) for source in sources] != [item.module]:
            raise SurgeryError(f"the new layer after '{item.after}' is not called right after it")


def _neutralize(norm: nn.Module, item: Insertion, layer: nn.Module) -> bool:
    """Make the layer add the removed bias and nothing else; False where it has no such state."""
    assert isinstance(norm, _BatchNorm)
    if uses_batch_statistics(norm):
        return False
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_var.fill_(1.0 - norm.eps)
        for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
            if parameter is not None:
                parameter.fill_(value)
        norm.running_mean.zero_()
        if item.direct and isinstance(layer.bias, torch.Tensor):
            norm.running_mean.copy_(-layer.bias)
    return True


def _coarseness(net: nn.Module) -> float:
    """0.01 for float32, 1 for half precision: rounding is not this check's business."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters())
    return 1.0 if half else 0.01
