"""Folding: batch normalization with known statistics becomes part of its neighbours."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import SurgeryError
from batchnorm.nn import batch_norm as ours
from batchnorm.nn import options as table
from batchnorm.nn.outside import has_hooks
from batchnorm.surgery import activations, branches, recurrent, subclasses
from batchnorm.surgery.absorption import Absorption, Line, State, Weights
from batchnorm.surgery.affine import ChannelMap, affine_of, is_norm, wide
from batchnorm.surgery.called import Owner, called_layers
from batchnorm.surgery.capture import NotCapturedError, capture
from batchnorm.surgery.certificate import Certificate as Certificate
from batchnorm.surgery.certificate import Difference as Difference
from batchnorm.surgery.certificate import Folded as Folded
from batchnorm.surgery.certificate import Kept as Kept
from batchnorm.surgery.certificate import Merged as Merged
from batchnorm.surgery.comparison import Example, copy_of, run_example
from batchnorm.surgery.flow import EXPORTED, DataFlow, data_inputs, operation
from batchnorm.surgery.frozen import eps_of, looks_frozen
from batchnorm.surgery.layers import CHANNEL_PADDED, AddActivation, ScaleShift
from batchnorm.surgery.modules import is_plain, obstacle, unwrap
from batchnorm.surgery.parts import Part, parts_called_again, parts_of
from batchnorm.surgery.plan import Plan, Step, replace_module
from batchnorm.surgery.rounding import TOLERANCE, coarsest_dtype, dtype_text
from batchnorm.surgery.verification import unseen, verify

_UNDERSTOOD = {  # arguments of our layers that are read here, or that change nothing in evaluation
    *("num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype", "bias", "decay"),
    *(word for option in table.TABLE if option.affine for word in (option.name, option.spelled)),
}
_HARMLESS = {(option.name, option.harmless) for option in table.TABLE if option.harmless is not None}


@dataclass(frozen=True)
class FoldResult:
    """The folded network and the certificate that it computes the same."""

    model: nn.Module
    certificate: Certificate


def fold(net: nn.Module, example: Any, *, tolerance: float | None = None) -> FoldResult:
    """Fold batch normalization into the layers around it, exactly, on a copy of ``net``.

    With population statistics batch normalization is ``scale * x + shift`` per channel, where
    ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale`` (Ioffe & Szegedy 2015, Algorithm 2,
    line 11; ``var`` is the layer's ``running_var``, in torch *unbiased*).

    - *After* a convolution (also transposed, grouped), linear, bilinear or embedding layer, ``W' = scale * W`` on the
      output axis and ``b' = scale * b + shift``.
    - *Before* convolutions and linear layers, ``W' = W * scale`` on the input axis and ``b' = b + W shift``; a
      zero-padded convolution gets the padding value ``-shift / scale``, one a channel.
    - Either way through dropout in evaluation mode, average-pooling that does not count padding, max-pooling where
      ``scale >= 0``, interpolation, flatten, reshape, permute, concatenation and split, and into another batch
      normalization.
    - *After* sums of values, each of which takes the scale in and one of which takes the shift in: layers, and
      parameters that a forward adds. Sums over neighbours, products and gathered rows pass a scale on, so batch
      normalization behind a graph convolution goes into its weights and the bias behind the sum.
    - Branches of one value whose sum is a convolution become that convolution: normalization of x itself, a 1x1 and a
      3x3 convolution with theirs (RepVGG; Ding et al. 2021, section 3.3), and so on. The module that computes the sum
      gets a forward that was generated from its graph, and keeps the submodules that are still called.
    - Inside recurrent layers, the normalization of W_ih x over whole sequences goes into W_ih, with a new bias;
      statistics by time step stay.

    Of a network that cannot be captured as a whole, because it looks into its data, those modules are folded that can
    be captured by themselves, if nothing outside one calls or reads what is in it, or shares it. ``certificate.parts``
    names them, and each is verified by itself, too.

    So are those that the network calls several times (the branch of a siamese network, a head over several levels),
    with values of one shape, or of any where no shape decides the forward.

    Layers are found by data flow, and only taken where nothing else sees their values. Any other layer is kept
    and listed with the reason; if its statistics are known, it becomes one ``ScaleShift`` that has its activation
    fused. Weights are computed in float64 and rounded once.

    Args:
        net: the network; it is not changed. Every batch normalization has to be in eval mode, or frozen.
        example: an input: a tensor, a tuple of positional or a mapping of keyword arguments.
        tolerance: largest accepted difference, relative to an output's largest value, in the network's dtype;
            default by dtype (float32: 1e-5), and never below four times the unfolded network's own rounding error
            on the same input.

    Returns:
        ``.model``, the folded copy, and ``.certificate``.

    Warns:
        UserWarning: outputs on the example differ since rounding alone decides a choice of the network
            (``topk`` between scores that are equal up to rounding); with the same choices they agree.

    Raises:
        InputError: when ``net`` is no module or fails on the example.
        SurgeryError: when there is nothing to fold, a batch normalization is in training mode, the network cannot be
            captured, or the folded network differs.

    Source: Ioffe & Szegedy 2015, Algorithm 2, line 11; Ding et al. 2021, RepVGG (branches).

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded = fold(net, torch.randn(2, 3, 8, 8))
        >>> folded.certificate.folded
        (Folded(layer='1', into='0'),)
    """
    network = unwrap(net, "fold")
    inputs = Example.of(example)
    _refuse_training_mode(network)
    inner = subclasses.opened(network, inputs)
    reference = copy_of(network, training=False)
    folded = subclasses.with_opened(network, inner)
    unfolded = copy_of(folded, training=False)
    parts, outside = _parts(folded, unfolded, inputs)
    dtype = coarsest_dtype(folded)
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    differences: list[Difference] = []

    def steps(copy: nn.Module, kind: torch.dtype | None = None) -> list[Step]:
        return [step for part in parts for step in part.plan.steps(part.within(copy), kind)]

    def compare() -> None:
        differences.extend(verify(reference, unfolded, folded, partial(steps, kind=torch.float64), done, inputs, limit))
        for part in (each for each in parts if each.name):
            differences.extend(_verified(part, reference, unfolded, folded, limit))

    names = {f"{name}.{subclasses.NORM}": name for name in inner}

    def named(part: Part[Folding], layer: str) -> str:
        return names.get(part.full(layer), part.full(layer))

    def stays(part: Part[Folding], item: Kept) -> Kept:
        reason = item.reason
        for end in ("input", "output") if part.name else ():
            reason = reason.replace(f"the network's {end}", f"the {end} of '{part.name}'")
        return dataclasses.replace(item, layer=named(part, item.layer), reason=reason)

    done = [Folded(named(part, item.layer), part.full_each(item.into)) for part in parts for item in part.plan.folded]
    kept = [stays(part, item) for part in parts for item in part.plan.kept]
    kept += [Kept(names.get(name, name), reason) for name, reason in outside.items()]
    Plan(folded, steps(folded), compare, skipped={item.layer: item.reason for item in kept}).apply()
    methods = sorted({part.plan.flow.method for part in parts})
    certificate = Certificate(
        tuple(done),
        tuple(kept),
        tuple(differences),
        ", ".join(methods),
        limit,
        dtype_text(dtype),
        tuple(
            Merged(part.full(item.into), tuple(b if b == "identity" else part.full(b) for b in item.branches))
            for part in parts
            for item in part.plan.merged
        ),
        tuple(part.name for part in parts if part.name),
        unseen(reference, inputs, sorted({item.layer for item in done})),
    )
    return FoldResult(folded, certificate)


def _parts(net: nn.Module, evaluated: nn.Module, inputs: Example) -> tuple[list[Part[Folding]], dict[str, str]]:
    """The folds of the whole network, and of what it calls several times; of its parts, where it cannot be captured.

    Beside them stands why layers lie in no part.

    Raises:
        NotCapturedError: where nothing of a network that cannot be captured folds.
    """

    def plan(name: str, given: Example, lent: frozenset[str]) -> Folding:
        inside = frozenset(key.removeprefix(f"{name}.") for key in lent)
        return _planned(net.get_submodule(name), evaluated.get_submodule(name), given, inside)

    try:
        flow_of_all = _planned(net, evaluated, inputs)
    except NotCapturedError as error:
        whole = error
    else:
        return [Part("", inputs, flow_of_all), *_called_again(evaluated, inputs, flow_of_all, plan)], {}
    found = parts_of(evaluated, inputs, is_norm, plan, whole)
    parts = [part for part in found.parts if part.plan.folded]
    if not parts:
        told = found.told()
        raise SurgeryError(f"{whole} Of its parts with batch normalization none folds{f': {told}' if told else ''}.")
    inside = tuple(f"{part.name}." for part in found.parts)
    layers = [name for name, module in evaluated.named_modules() if is_norm(module)]
    outside = {name: found.reason(name) for name in layers if not name.startswith(inside)}
    return found.parts, outside


def _called_again(
    net: nn.Module, inputs: Example, whole: Folding, plan: Callable[[str, Example, frozenset[str]], Folding]
) -> list[Part[Folding]]:
    """The folds inside modules that a network calls several times, by their own flows; ``whole`` lists them no longer.

    A module that is called with several shapes folds where its flow does not depend on them.
    """
    again = {item.layer for item in whole.kept if len(whole.flow.calls(item.layer)) > 1}
    if not again:
        return []

    def wanted(name: str, times: int) -> bool:
        return times > 1 and any(layer.startswith(f"{name}.") for layer in again) and not whole.edits(name)

    def counts(part: Part[Folding]) -> bool:
        return bool(part.plan.folded) and (part.of_one_shape or part.plan.flow.method == "torch.fx")

    parts = parts_called_again(net, inputs, wanted, plan, counts)
    whole.kept = [item for item in whole.kept if not any(part.holds(item.layer) for part in parts)]
    return parts


def _verified(
    part: Part[Folding], reference: nn.Module, unfolded: nn.Module, folded: nn.Module, limit: float
) -> list[Difference]:
    """The proof for one part, on values of its own."""
    if not part.plan.folded:
        return []
    given, opened, done = (part.within(net) for net in (reference, unfolded, folded))
    exact = partial(part.plan.steps, dtype=torch.float64)
    found = verify(given, opened, done, exact, part.plan.folded, part.example, limit)
    return [dataclasses.replace(d, output=f"{part.name}: {d.output}") for d in found]


def _planned(net: nn.Module, evaluated: nn.Module, inputs: Example, lent: frozenset[str] = frozenset()) -> Folding:
    """The folds of a network in evaluation mode that are also those of its own modes.

    Args:
        net: the network, in the modes that it has.
        evaluated: a copy in evaluation mode.
        inputs: the example.
        lent: modules without state in it that others use, too.
    """
    overwritten = _overwritten(evaluated, inputs)

    def planned(given: nn.Module, allowed: dict[str, str] | None = None) -> Folding:
        flow = capture(given, inputs)
        if flow.draws:
            way = "call net.eval() first" if given is not evaluated else "fold the parts that do not, one by one"
            raise SurgeryError(f"fold: the forward of {type(net).__name__} draws random numbers outside torch; {way}")
        folding = Folding(flow, overwritten, allowed, owners=called_layers(flow, inputs), merging=True, lent=lent)
        folding.run()
        return folding

    if not any(module.training for module in net.modules()):
        return planned(evaluated)
    return planned(evaluated, {item.layer: item.into for item in planned(net).folded})


@dataclass(frozen=True)
class Site:
    """A batch normalization in the graph, ``line`` in float64."""

    name: str
    layer: nn.Module
    node: fx.Node
    line: Line

    @property
    def source(self) -> fx.Node:
        return data_inputs(self.node)[0]

    @property
    def map(self) -> ChannelMap:
        return ChannelMap(self.line.scale, self.line.shift, self.line.axis)


Replacement = Callable[["torch.dtype | None"], nn.Module]


@dataclass
class Folding:
    """Folds planned on a captured graph; the network is not touched.

    ``state`` holds what the layers become, ``gone`` what takes the place of each module that goes, made for a dtype,
    and ``owners`` where the tensors of layers are that are calls. ``lent`` modules stay as they are. With ``merging``,
    branches whose sum is a convolution become one; ``forwards`` holds the new forwards of the modules that computed the
    sums.
    """

    flow: DataFlow
    overwritten: set[str] = field(default_factory=set)
    allowed: dict[str, str] | None = None
    folded: list[Folded] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    gone: dict[str, Replacement] = field(default_factory=dict)
    owners: dict[str, Owner] = field(default_factory=dict)
    merging: bool = False
    lent: frozenset[str] = frozenset()
    merged: list[Merged] = field(default_factory=list)
    forwards: dict[str, fx.Graph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = State(self.flow)

    def run(self) -> None:
        """Visit every batch normalization in the order of the data."""
        layers = {name: module for name, module in self.flow.modules.items() if is_norm(module)}
        for name, module in self.flow.modules.items():
            for inside in recurrent.normalizations(module) if self.flow.calls(name) else {}:
                layers.pop(f"{name}.{inside}".removeprefix("."), None)
            self.fold_inside(name, module)
        unlike = [name for name, module in self.flow.modules.items() if looks_frozen(module) and name not in layers]
        for name in unlike:
            if eps_of(self.flow.modules[name]) is not None:
                self.kept.append(Kept(name, "it has hooks, or children that are not called in a line behind it"))
        if not layers and not self.folded and not self.kept:
            raise SurgeryError("fold: the network has no batch normalization to fold" + _told_of_unlike(unlike))
        self.state.foldable = {name: self.obstacle(name, layer) for name, layer in layers.items()}
        order = {self.flow.name(n): i for i, n in enumerate(self.flow.nodes) if n.op == "call_module"}
        unmerged = self.merge() if self.merging else {}
        layers = {name: layer for name, layer in layers.items() if name not in {item.layer for item in self.folded}}
        reasons: dict[str, str] = {}
        for name in sorted(layers, key=lambda name: order.get(name, -1)):
            outcome = self.visit(name, layers[name])
            if isinstance(outcome, Folded):
                self.folded.append(outcome)
            else:
                reasons[name] = f"{unmerged[name]}; {outcome}" if name in unmerged else outcome
        self.kept += [Kept(name, reason, self.reduce(name, layers[name])) for name, reason in reasons.items()]
        for node in self.flow.nodes:
            if node.op == "call_function" and operation(node) == "batch_norm":
                self.kept.append(Kept("functional batch_norm", "it is a call, not a module"))

    def merge(self) -> dict[str, str]:
        """Make sums of branches single convolutions; the reasons for those that stay, by normalization."""
        found, reasons = branches.merges(self.state)
        for home, merges in branches.by_home(self.flow.net, found).items():
            graph = branches.rewritten(self.flow, home, merges)
            changed = [m for m in merges if self.allowed and any(self.allowed.get(n) != m.host for n in m.sum.norms)]
            if isinstance(graph, str) or changed or self.allowed == {}:
                why = graph if isinstance(graph, str) else "the data flow in training mode is another one"
                reasons |= {name: f"its branches stay: {why}" for m in merges for name in m.sum.norms}
                continue
            self.forwards[home] = graph
            for merge in merges:
                self.accept_merge(merge)
        return reasons

    def accept_merge(self, merge: branches.Merge) -> None:
        """Take all branches but the host out of the graph."""
        host = self.flow.calls(merge.host)[0]
        merge.value.replace_all_uses_with(host, delete_user_cb=lambda user: user not in merge.sum.nodes)
        for node in reversed(self.flow.nodes):
            if node in merge.sum.nodes and node is not host:
                self.flow.graph.erase_node(node)
        self.state.weights[merge.host] = merge.weights
        self.merged.append(Merged(merge.host, merge.branches))
        self.folded += [Folded(name, merge.host) for name in merge.sum.norms]

    def fold_inside(self, name: str, layer: nn.Module) -> None:
        """Fold what normalizes W_ih x over whole sequences into W_ih, in a recurrent layer of the graph."""
        norms = recurrent.normalizations(layer) if self.flow.calls(name) else {}
        if not norms:
            return
        of_input = {key: norm for key, norm in norms.items() if key.startswith("norm_ih")}
        reasons = {key: recurrent.obstacle(norm) or _unknown_transform(norm) for key, norm in norms.items()}
        if has_hooks(layer) or any(has_hooks(norm) for norm in norms.values()):
            reasons = dict.fromkeys(norms, "there are hooks in its recurrent layer, which would be lost; remove them")
        first = next((reasons[key] for key in of_input if reasons[key]), None)
        if first is None:
            self.gone[name] = lambda dtype: recurrent.folded(layer, dtype)
        for key in norms:
            inside = f"{name}.{key}".removeprefix(".")
            if first is None and key in of_input:
                into = f"{name}.weight_ih{key.removeprefix('norm_ih')}".removeprefix(".")
                self.folded.append(Folded(inside, into))
            else:
                self.kept.append(Kept(inside, reasons[key] or first or recurrent.BY_STEP))

    def obstacle(self, name: str, layer: nn.Module) -> str | None:
        """Why the layer is no affine map of one input that nothing else depends on, or None."""
        reason = obstacle(self.flow, name) or _unknown_transform(layer)
        if reason is not None:
            return reason
        node = self.flow.calls(name)[0]
        if len(data_inputs(node)) != 1 and not self.adds_residual(name):
            return "it takes more than one input"
        if not all(bool(x.isfinite().all()) for x in affine_of(layer)):
            return "its statistics or parameters are not finite, or running_var + eps is negative"
        return None

    def adds_residual(self, name: str) -> bool:
        """Whether the layer is called with a residual beside its input, and nothing else."""
        node = self.flow.calls(name)[0]
        arguments = [*node.args, *node.kwargs.values()]
        return self.flow.method != EXPORTED and len(arguments) == 2 and not set(node.kwargs) - {"residual"}

    def visit(self, name: str, layer: nn.Module) -> Folded | str:
        reason = self.state.foldable[name]
        if reason is not None:
            return reason
        site = Site(name, layer, self.flow.calls(name)[0], self.state.line(name))
        reasons = []
        for rule in RULES:
            outcome = rule(self, site)
            if isinstance(outcome, Folded):
                return outcome
            reasons += [outcome] if outcome else []
        return "; ".join(reasons)

    def accept(self, site: Site, absorption: Absorption) -> Folded | str:
        """Take the site out of the graph; a fused activation or residual stays in its place."""
        into = ", ".join(absorption.into)
        if self.allowed is not None and self.allowed.get(site.name) != into:
            return "the data flow in training mode is another one"
        absorption.commit()
        activation, adds = activations.of_layer(site.layer), self.adds_residual(site.name)
        self.gone[site.name] = lambda dtype: _remainder(activation, adds)
        if activation is None and not adds:
            site.node.replace_all_uses_with(site.source)
            self.flow.graph.erase_node(site.node)
        return Folded(site.name, into)

    def reduce(self, name: str, layer: Any) -> str | None:
        """Plan a ``ScaleShift`` in the place of a layer that stays; its description, or None."""
        if self.state.foldable[name] is not None:
            return None
        node, line = self.flow.calls(name)[0], self.state.line(name)
        dtype = layer.running_mean.dtype
        center = wide(layer.running_mean) if name not in self.state.lines else torch.zeros_like(line.scale)
        weight, bias = line.scale, line.shift + line.scale * center
        if not all(bool(value.to(dtype).isfinite().all()) for value in (weight, bias)):
            return None
        activation = activations.of_layer(layer)
        after = activations.following(self.flow, node) if activation is None else None
        if isinstance(after, tuple) and after[0] not in self.lent:
            activation = after[1]
            self.gone[after[0]] = lambda dtype: nn.Identity()

        def make(wanted: torch.dtype | None) -> nn.Module:
            values = (value.to(layer.running_mean.device, wanted or dtype) for value in (center, weight, bias))
            made = ScaleShift(
                *values,
                activation=activation.name if activation else None,
                negative_slope=activation.slope if activation else 0.01,
                channels_last=bool(getattr(layer, "channels_last", False)),
            )
            return made.requires_grad_(isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad)

        self.gone[name] = make
        return str(make(None))

    def edits(self, name: str) -> bool:
        """Whether something in the module ``name`` becomes something else."""
        changed = [*self.state.weights, *self.state.vectors, *self.gone, *self.forwards]
        return any(f"{key}.".startswith(f"{name}.") for key in changed)

    def steps(self, net: nn.Module, dtype: torch.dtype | None = None) -> list[Step]:
        """The edits that bring the plan about in ``net``, a copy of the captured network."""
        steps = [
            Step(f"{home or 'the network'}: branches become one convolution", branches.becomes_graph(net, home, graph))
            for home, graph in self.forwards.items()
        ]
        for name, new in self.state.weights.items():
            owner = self.owners.get(name, Owner(name, "weight", "bias"))
            layer = net.get_submodule(owner.module)
            steps.append(Step(f"{name}: new weights", _assignment(layer, new, dtype, owner)))
        for path, values in self.state.vectors.items():
            home, _, key = path.rpartition(".")
            do = _assignment(net.get_submodule(home), Weights(values, None), dtype, Owner(home, key, ""))
            steps.append(Step(f"{path}: new values", do))
        for name, make in self.gone.items():
            old, module = net.get_submodule(name), make(dtype)
            for key, value in vars(old).items():  # a forward may read eps, num_features, ...
                if not key.startswith("_") and not hasattr(module, key):
                    setattr(module, key, value)
            activations.takes_over(module, old)
            do = _replacement(net, old, module.train(old.training))
            steps.append(Step(f"{name}: replaced by {module}", do))
        return steps


Rule = Callable[[Folding, Site], "Folded | str | None"]
"""A rule folds the site, says why it cannot, or does not apply (None)."""


def into_layers_before(folding: Folding, site: Site) -> Folded | str | None:
    """Scale the output channels of the layer or, behind a concatenation, layers that feed it."""
    absorption = Absorption(folding.state, site.node)
    return absorption.before(site.source, site.map) or folding.accept(site, absorption)


def into_layers_after(folding: Folding, site: Site) -> Folded | str | None:
    """Scale the input channels of every layer that takes its output."""
    if activations.of_layer(site.layer) is not None or folding.adds_residual(site.name):
        return None
    absorption = Absorption(folding.state, site.node)
    reason = absorption.after(site.node, site.map)
    if reason is not None:
        return reason
    if site.name in folding.overwritten:
        return "its input is changed in place after it is read"
    return folding.accept(site, absorption)


RULES: Sequence[Rule] = (into_layers_before, into_layers_after)
"""Tried in turn for each batch normalization; the first that folds it wins."""


def _overwritten(net: nn.Module, example: Example) -> set[str]:
    """The norms whose input's memory is written to after they have read it; without them that would show."""
    watched = copy_of(net)
    read: dict[str, list[tuple[Tensor, int]]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: read.setdefault(name, []).extend((x, _version(x)) for x in args[:1])

    for name, module in watched.named_modules():
        if is_norm(module):
            module.register_forward_pre_hook(note(name))
    run_example(watched, example)
    return {
        name for name, inputs in read.items() if any(_version(x) != version or version < 0 for x, version in inputs)
    }


def _version(x: Tensor) -> int:
    """How often the memory was written to; -1 where torch does not count."""
    return -1 if x.is_inference() else x._version


def _remainder(activation: activations.Activation | None, adds: bool) -> nn.Module:
    if adds:
        return AddActivation(activation.module() if activation else nn.Identity())
    return activation.module() if activation else nn.Identity()


def _told_of_unlike(names: list[str]) -> str:
    """That these modules hold the tensors of batch normalization, and are not taken for it."""
    if not names:
        return ""
    return (
        f"; {', '.join(map(repr, names))} hold its four tensors, but a trial run gives something else than "
        "(x - mean) / sqrt(var + eps) * gamma + beta with one eps"
    )


def uses_batch_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer, in the mode it is in, normalizes with the batch's own statistics."""
    source = getattr(layer, "source", "auto")
    if source != "auto":
        return bool(source == "batch") or layer.running_mean is None
    return layer.training or layer.running_mean is None


def _unknown_transform(layer: nn.Module) -> str | None:
    """Why the layer's output in evaluation is not known to be affine, or None."""
    if isinstance(layer, _BatchNorm) and uses_batch_statistics(layer):
        return "it normalizes with the statistics of each batch"
    if not isinstance(layer, ours.BatchNorm):
        return None
    parameters = inspect.signature(type(layer).__init__).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty} | table.DEFAULTS
    for key in defaults.keys() - _UNDERSTOOD:
        value = getattr(layer, key, defaults[key])
        if value != defaults[key] and (key, value) not in _HARMLESS:
            one = "; bn.convert(net, domains=0) keeps the domain in use alone" if key == "domains" else ""
            return f"its option {key}={value!r} makes more of it than scale and shift{one}"
    activation = layer.activation
    if activation and activation not in activations.KNOWN:
        return f"its fused activation {activation!r} has no module"
    return None


def _assignment(layer: nn.Module, new: Weights, dtype: torch.dtype | None, names: Owner) -> Callable[[], None]:
    def do() -> None:
        old = layer._parameters[names.weight]
        assert isinstance(old, nn.Parameter)
        weight = torch.empty_like(old, dtype=dtype or old.dtype).copy_(new.weight)
        layer.register_parameter(names.weight, nn.Parameter(weight, requires_grad=old.requires_grad))
        if new.bias is not None:
            bias = new.bias.to(old.device, dtype or old.dtype)
            layer.register_parameter(names.bias, nn.Parameter(bias, requires_grad=old.requires_grad))
        if new.padding is not None:
            layer.__class__ = CHANNEL_PADDED.get(type(layer), type(layer))
            layer.register_buffer("padding_value", new.padding.to(old.device, dtype or old.dtype))

    return do


def _replacement(net: nn.Module, old: nn.Module, new: nn.Module) -> Callable[[], None]:
    return lambda: replace_module(net, old, new)


def _refuse_training_mode(net: nn.Module) -> None:
    training = [
        name
        for name, module in net.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and is_plain(module)
        and getattr(module, "source", "auto") == "auto"
    ]
    if training:
        raise SurgeryError(
            f"fold: {', '.join(repr(name) for name in training)} in training mode; "
            "call net.eval() or bn.freeze(net) first"
        )
