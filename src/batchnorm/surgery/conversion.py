"""Conversion of a network's batch normalization to other options or classes, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.errors import InputError, SurgeryError, by_reason
from batchnorm.nn import batch_norm as ours
from batchnorm.nn import foreign, modes
from batchnorm.nn import options as table
from batchnorm.nn.buffers import FLAGS, widen_parameters
from batchnorm.surgery import memory_order, sample_fit
from batchnorm.surgery.activations import is_computed_by
from batchnorm.surgery.comparison import Example, copy_of, run_example
from batchnorm.surgery.freezing import is_frozen
from batchnorm.surgery.frozen import told_of_frozen
from batchnorm.surgery.modules import is_plain, unwrap
from batchnorm.surgery.plan import Plan, Step, replace_module
from batchnorm.surgery.rounding import TOLERANCE, Rounding

TARGETS = ("batchnorm", "torch", "sync", *sample_fit.KINDS)
SOURCES: dict[str, type[nn.Module]] = {
    "batch_norm": _BatchNorm,
    "group_norm": nn.GroupNorm,
    "layer_norm": nn.LayerNorm,
    "instance_norm": _InstanceNorm,
}
_MEMORY = "_before_conversion"
_ABSORBED = "_absorbed"
REPORT = "report"  # the attribute of an accelerated network that tells what was done
_PAIRS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.BatchNorm1d: ours.BatchNorm1d,
    nn.BatchNorm2d: ours.BatchNorm2d,
    nn.BatchNorm3d: ours.BatchNorm3d,
}
_BY_AXES = {2: 1, 3: 1, 4: 2, 5: 3}
_BY_SAMPLE = {"group_norm": "GroupNorm", "layer_norm": "LayerNorm", "instance_norm": "InstanceNorm"}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_AGREES = 1e-4


@dataclass(frozen=True)
class Original:
    """A layer's class, own attributes, names of buffers and shapes of parameters before it was converted.

    ``values`` holds what the conversion took away or replaced: buffers, and gamma and beta of a fit.
    """

    kind: type[nn.Module]
    attributes: dict[str, Any]
    buffers: frozenset[str]
    shapes: dict[str, torch.Size]
    values: dict[str, Tensor | None] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        return self  # never changed, and a process group in it is a handle


class Absorbed(nn.Identity):
    """Stands where an activation was that the layer before it now computes.

    If another tool puts a layer of its own in that layer's place, the activation would be lost. So the stand-in looks
    whether the layer still stands where it stood, and computes the activation if it does not.
    """

    _name: str
    _places: list[tuple[dict[str, nn.Module | None], str]]

    def __init__(self, original: nn.Module, name: str, places: list[tuple[nn.Module, str]]) -> None:
        super().__init__()
        # None of them is a submodule. A registry is held instead of its module: it is the same object in a copy.
        self.__dict__[_ABSORBED] = original
        self.__dict__["_name"] = name
        self.__dict__["_places"] = [(parent._modules, key) for parent, key in places]
        self.training = original.training

    def forward(self, input: Tensor) -> Tensor:
        """The input, which is activated already, or else the activation of it."""
        if all(is_computed_by(modules.get(key), self._name) for modules, key in self._places):
            return input
        original: nn.Module = self.__dict__[_ABSORBED]
        result: Tensor = original(input)
        return result

    def extra_repr(self) -> str:
        return repr(self.__dict__[_ABSORBED])


def convert(
    net: nn.Module,
    example: Any = None,
    *,
    to: str = "batchnorm",
    of: str = "batch_norm",
    fit: Iterable[Any] | None = None,
    groups: int | None = None,
    **options: Any,
) -> nn.Module:
    """Give every batch normalization layer of ``net`` the same options, or another class, in place.

    Layers keep their parameters, running statistics, hooks and ``state_dict`` keys; they stay the same objects, so
    optimizers need not know. ``revert`` undoes it.

    ``torch.nn.SyncBatchNorm`` keeps its process group as ``process_group=`` (the default group is "world"), unless that
    option is given. With a process group, ``layer.label`` becomes the layer's name in ``net``, which errors of
    synchronization tell.

    ``torch.nn.GroupNorm`` is this package's layer with ``ghost_size=1`` (each sample for itself), ``channel_groups=G``,
    ``source="batch"`` and no running statistics, for every size of batch, in training and in evaluation; so is
    ``torch.nn.LayerNorm`` over all axes but the first, of one group, if its gamma and beta are one number a channel.
    ``of="group_norm"`` and ``of="layer_norm"`` convert to that form, ``to="group_norm"`` and ``to="layer_norm"`` from
    it. So is ``torch.nn.InstanceNorm*d`` (``"instance_norm"``), of one group a channel. Batch normalization that pools
    over the batch has no such form, and is refused without ``fit``.

    With ``fit``, batches as for `calibrate`, such layers get the normalization of samples whose gamma and beta make
    their outputs agree best (least squares, layer by layer) with the batch normalization's in evaluation. That is
    another function: the difference of the network's outputs on these batches is measured and told in a warning.
    ``revert`` gives the old gamma, beta and statistics back.

    Args:
        net: the network; it is changed and returned.
        example: an input; needed to know the axes of ``SyncBatchNorm``'s, ``GroupNorm``'s and ``LayerNorm``'s inputs.
            Where it is given and no option is, the network's output on it in evaluation mode has to stay the same.
        to: ``"batchnorm"`` (this package's layers), ``"torch"`` (``torch.nn.BatchNorm*d``; an option of ours that
            torch lacks is refused), ``"sync"`` (``torch.nn.SyncBatchNorm``), ``"group_norm"``, ``"layer_norm"`` or
            ``"instance_norm"`` (of layers that normalize each sample by itself, or with ``fit``).
        of: which layers are converted: ``"batch_norm"``, or ``"group_norm"``, ``"layer_norm"`` or ``"instance_norm"``
            (to ``"batchnorm"`` alone, without options). A ``LayerNorm`` over (C, *space) gets new parameters of shape
            (C,).
        fit: batches to fit on; two passes over them for each layer.
        groups: of GroupNorm, with ``fit``; by default 32, or the largest number that divides 32 and the channels.
        options: for ``"batchnorm"``: eps, momentum, decay, and what our layers take beyond torch's, as
            ``nonfinite="skip"``.

    Returns:
        The network.

    Warns:
        UserWarning: with an example, where rounding alone decides a choice of the network, as of `accelerate`.

    Raises:
        InputError: an unknown option, value or target.
        SurgeryError: a layer that cannot be converted; nothing is then changed.

    Source: Wu & He 2018, Group normalization; Ba, Kiros & Hinton 2016, Layer normalization; Ulyanov, Vedaldi &
    Lempitsky 2016, Instance normalization (the forms that are one sample's).

    Examples:
        >>> net = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nonfinite="skip")
        >>> net[1].nonfinite
        'skip'
        >>> type(revert(net)[1]) is nn.BatchNorm1d
        True
    """
    root = unwrap(net, "convert")
    for name, value, known in (("to", to, TARGETS), ("of", of, tuple(SOURCES))):
        if value not in known:
            raise InputError(f"convert: {name} is {value!r}, expected one of {', '.join(known)}")
    if of != "batch_norm" and (to != "batchnorm" or options):
        raise InputError(f"convert: of={of!r} goes with to='batchnorm' and no options; give those in a second call")
    if (fit is not None or groups is not None) and (to not in _BY_SAMPLE or of != "batch_norm"):
        raise InputError(
            f"convert: fit and groups go with to={', '.join(map(repr, _BY_SAMPLE))} of batch normalization"
        )
    values = _checked_options(to, options)
    layers = {n: m for n, m in root.named_modules() if isinstance(m, SOURCES[of])}
    if not layers:
        raise SurgeryError(
            f"convert: the network has no {'batch normalization' if of == 'batch_norm' else _BY_SAMPLE[of]}"
            + (told_of_frozen(root) if of == "batch_norm" else "")
        )
    given = None if example is None else Example.of(example)
    seen = {} if given is None else _shapes(root, given, SOURCES[of])
    targets = {name: _target(layer, to, seen.get(id(layer), set()), values) for name, layer in layers.items()}
    fitted = None if fit is None else _fitted(root, layers, targets, to, fit, groups)
    reasons = {name: target for name, target in targets.items() if isinstance(target, str)}
    if reasons:
        raise SurgeryError(f"convert: {by_reason(reasons)}. Nothing was changed.")
    steps = []
    for name, target in targets.items():
        assert not isinstance(target, str)
        if fitted is not None and name in fitted.affine:
            do = _to_sample(layers[name], target, fitted.kinds[name][1], fitted.affine[name])
        elif of != "batch_norm":
            do = _from_sample(layers[name], target)
        elif to in _BY_SAMPLE:
            do = _to_sample(layers[name], target)
        else:
            do = becoming(layers[name], target, _with_group(name, layers[name], target, values))
        steps.append(Step(f"{name}: {target.__name__}", do))
    before = copy_of(root, training=False) if given is not None and not values and fitted is None else None

    def verify() -> None:
        if before is not None and given is not None:
            own = Rounding(before, given)
            own.compare(copy_of(root, training=False), TOLERANCE[own.dtype], "convert")

    Plan(root, steps, verify).apply()
    if fitted is not None and not fitted.difference <= _AGREES:
        warnings.warn(
            "convert: normalization of samples is another function: on the batches of fit the network's outputs differ "
            f"from those of batch normalization in evaluation by {fitted.difference:.2g} of their standard deviation. "
            "Train on; revert gives batch normalization back",
            stacklevel=2,
        )
    return net


def _fitted(
    net: nn.Module,
    layers: dict[str, Any],
    targets: dict[str, type[nn.Module] | str],
    to: str,
    fit: Iterable[Any],
    groups: int | None,
) -> sample_fit.SampleFit | None:
    """Fits for the layers that have no equal; puts the classes, or why there is none, into ``targets``."""
    chosen = {}
    for name, target in targets.items():
        if isinstance(target, str):
            reason = refusal(layers[name]) or _unlike_evaluation(layers[name])
            targets[name] = reason or target
            if reason is None:
                chosen[name] = layers[name]
    if not chosen or any(isinstance(target, str) for name, target in targets.items() if name not in chosen):
        return None
    found = sample_fit.fit_samples(net, chosen, to, fit, groups)
    targets.update({name: kind for name, (kind, _) in found.kinds.items()})
    return found


def _unlike_evaluation(layer: _BatchNorm) -> str | None:
    """Why there are no running statistics to fit to, or more than normalization by them; None where it can be done."""
    if layer.running_mean is None:
        return "keeps no running statistics whose output a fit could aim at"
    if not isinstance(layer, ours.BatchNorm):
        return None
    if layer.source == "batch":
        return "normalizes by the batch in evaluation, too; a fit aims at running statistics"
    for option in ("activation", "domains", "max_steps", "pool", "example_weight"):
        if getattr(layer, option, None):
            return f"has {option}={getattr(layer, option)!r}, which torch.nn's layers lack"
    return None


def revert(net: nn.Module) -> nn.Module:
    """Undo ``convert`` and ``accelerate``: every layer's class and options as they were, in place.

    Parameters, running statistics and the ``training`` flags keep the values that they have. Layers that were
    never changed are left alone.

    Args:
        net: the network; it is changed and returned.

    Returns:
        The network.

    Raises:
        InputError: when ``net`` is no module.
        SurgeryError: for frozen layers; unfreeze first. For statistics of domains or time steps that differ, where
            there was one set of them. Nothing is then changed.

    Source: this package.

    Examples:
        >>> net = convert(nn.Sequential(nn.BatchNorm1d(4)), nonfinite="skip")
        >>> type(revert(net)[0]) is nn.BatchNorm1d
        True
    """
    root = unwrap(net, "revert")
    changed = {name: m for name, m in root.named_modules() if _MEMORY in m.__dict__}
    frozen = [name for name, module in changed.items() if is_frozen(module)]
    if frozen:
        raise SurgeryError(f"revert: {', '.join(map(repr, frozen))} frozen; call bn.unfreeze(net) first")
    many = [name for name, module in changed.items() if _loses_rows(module)]
    if many:
        raise SurgeryError(
            f"revert: {', '.join(map(repr, many))} has statistics of several domains or time steps, and had one set of "
            "them; choose first: bn.use_domain(net, i) and bn.convert(net, domains=0) keep those of domain i, "
            "bn.convert(net, pool=None, max_steps=0) those of the first step. Nothing was changed."
        )
    steps = [Step(f"{name}: as it was", _restoring(module)) for name, module in changed.items()]
    for name, module in root.named_modules():
        if isinstance(module, Absorbed):
            steps.append(Step(f"{name}: as it was", _returning(root, module)))
        elif "original_kind" in vars(type(module)):
            steps.append(Step(f"{name}: its own forward", _own_forward(module)))
        if memory_order.LAID_OUT in module.__dict__:
            steps.append(Step(f"{name}: the usual order of its weight", partial(memory_order.put_back, module)))
    Plan(root, steps, lambda: None).apply()
    root.__dict__.pop(REPORT, None)
    return net


def becoming(layer: nn.Module, kind: type[nn.Module], options: dict[str, Any]) -> Callable[[], None]:
    """Make the layer one of class ``kind`` with these options, and remember what it was."""

    def do() -> None:
        _remember(layer)
        if type(layer) is not kind:
            state = dict(layer.__dict__)
            layer.__class__ = kind
            if isinstance(layer, ours.BatchNorm):
                layer.__setstate__(state)
            else:
                _leave_ours(layer, kind)
        for name, value in options.items():
            setattr(layer, name, value)

    return do


def _remember(layer: nn.Module) -> None:
    if _MEMORY not in layer.__dict__:
        shapes = {name: p.shape for name, p in layer._parameters.items() if p is not None}
        layer.__dict__[_MEMORY] = Original(type(layer), _own(layer), frozenset(layer._buffers), shapes)


def _from_sample(layer: Any, kind: type[nn.Module]) -> Callable[[], None]:
    """Make a GroupNorm or LayerNorm batch normalization of each sample by itself."""
    groups, channels = _groups(layer)

    def do() -> None:
        _remember(layer)
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                flat = parameter.detach().flatten(1)[:, 0].clone()
                layer._parameters[name] = nn.Parameter(flat, requires_grad=parameter.requires_grad)
        for name in _own(layer):
            if name != "eps":
                del layer.__dict__[name]
        layer.__dict__.update(num_features=channels, momentum=0.1, track_running_stats=False)
        layer.__dict__["affine"] = layer._parameters["weight"] is not None
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            layer.register_buffer(name, None)
        options = {"source": "batch", "ghost_size": 1, "channel_groups": groups if groups < channels else 0}
        becoming(layer, kind, options)()

    return do


def _to_sample(
    layer: Any, kind: type[nn.Module], groups: int | None = None, affine_to: tuple[Tensor, Tensor] | None = None
) -> Callable[[], None]:
    """The way back from `_from_sample`; with the groups, gamma and beta of a fit."""
    channels = layer.num_features
    groups = groups or getattr(layer, "channel_groups", 0) or channels

    def do() -> None:
        _remember(layer)
        values = layer.__dict__[_MEMORY].values
        values.update({name: value for name, value in layer._buffers.items() if value is not None})
        if affine_to is not None:
            like = layer.running_mean
            for name, value in zip(("weight", "bias"), affine_to, strict=True):
                parameter = layer._parameters.get(name)
                values[name] = None if parameter is None else parameter.detach().clone()
                if parameter is None:
                    layer._parameters[name] = nn.Parameter(value.to(like.device, like.dtype))
                else:
                    with torch.no_grad():
                        parameter.copy_(value)
        eps, affine = layer.eps, layer.weight is not None
        for name in _own(layer):
            layer.__dict__.pop(name, None)
        layer._buffers.clear()
        layer.__class__ = kind
        layer.__dict__["eps"] = eps
        if kind is nn.GroupNorm:
            layer.__dict__.update(num_groups=groups, num_channels=channels, affine=affine)
        elif issubclass(kind, _InstanceNorm):
            layer.__dict__.update(num_features=channels, momentum=0.1, affine=affine, track_running_stats=False)
            layer._buffers.update(dict.fromkeys(("running_mean", "running_var", "num_batches_tracked")))
        else:
            layer.__dict__.update(normalized_shape=(channels,), elementwise_affine=affine)

    return do


def _groups(layer: Any) -> tuple[int, int]:
    """Groups of channels that share statistics, and channels."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups, layer.num_channels
    if isinstance(layer, _InstanceNorm):
        return layer.num_features, layer.num_features
    return 1, layer.normalized_shape[0]


def _of_sample(layer: Any, shapes: set[tuple[int, ...]]) -> type[nn.Module] | str:
    """Our class for a GroupNorm or LayerNorm on inputs of these shapes, or why there is none."""
    kind = type(layer)
    if kind not in (nn.GroupNorm, nn.LayerNorm, *_INSTANCE_NORMS.values()) or not is_plain(layer):
        return f"is a {kind.__qualname__}, which may do more than torch.nn's"
    ranks = {len(shape) for shape in shapes}
    if len(ranks) != 1:
        return f"is a {kind.__name__}, which takes inputs of any rank; give an example that passes through it in one"
    (axes,) = ranks
    if axes not in _BY_AXES:
        return f"normalizes inputs with {axes} axes, which no layer for (N, C, *space) takes"
    if isinstance(layer, _InstanceNorm):
        if layer.track_running_stats:
            return "keeps running statistics of samples, which no layer here does"
        if type(layer) is not _INSTANCE_NORMS.get(axes):
            return f"normalizes an input with {axes} axes, one sample without its batch; give a batch"
    if kind is nn.LayerNorm:
        if axes != len(layer.normalized_shape) + 1:
            return (
                f"normalizes the last {len(layer.normalized_shape)} of {axes} axes: each position by itself, "
                "where no layer here pools less than a sample"
            )
        for parameter in layer.parameters():
            flat = parameter.detach().reshape(len(parameter), -1)
            if not bool((flat == flat[:, :1]).all()):
                return "has gamma and beta that differ between the places of a channel, where ours are one a channel"
    return ours.BY_RANK[_BY_AXES[axes]]


def _by_sample(layer: _BatchNorm, to: str, shapes: set[tuple[int, ...]]) -> type[nn.Module] | str:
    """GroupNorm or LayerNorm for a layer that normalizes each sample by itself; for others, why there is none."""
    name = _BY_SAMPLE[to]
    if not isinstance(layer, ours.BatchNorm) or layer.ghost_size != 1:
        return (
            f"stays: {name} pools over a sample, batch normalization over the batch: no {name} computes the same; "
            "fit=batches gives the one that agrees best"
        )
    unused = layer.source == "batch" and layer.update == "never"
    if not unused and (layer.running_mean is not None or layer.running_var is not None):
        return (
            f"keeps running statistics, which {name} lacks; convert it to source='batch', update='never' first, or "
            "construct it with track_running_stats=False"
        )
    if type(layer) not in ours.BY_RANK.values():
        return f"is a {type(layer).__qualname__}, which takes other inputs than {name}"
    for option in table.changed(layer):
        if not option.by_sample:
            return f"has {option.name}={getattr(layer, option.name)!r}, which {name} lacks"
    if to == "group_norm":
        return nn.GroupNorm
    groups = layer.channel_groups or layer.num_features
    if to == "instance_norm":
        (axes,) = {len(shape) for shape in shapes} if len({len(shape) for shape in shapes}) == 1 else (0,)
        if groups != layer.num_features:
            return f"normalizes {groups} groups of channels, InstanceNorm each channel; to='group_norm' has them"
        if axes not in _INSTANCE_NORMS:
            return "is InstanceNorm for inputs (N, C, *space) alone, which an example has to show"
        return _INSTANCE_NORMS[axes]
    if groups > 1:
        return f"normalizes {groups} groups of channels, LayerNorm one; to='group_norm' has them"
    if {len(shape) for shape in shapes} != {2}:
        return "is LayerNorm for inputs (N, C) alone, which an example has to show; to='group_norm' takes all"
    return nn.LayerNorm


def replacing(net: nn.Module, old: nn.Module, new: nn.Module) -> Callable[[], None]:
    return lambda: replace_module(net, old, new)


def refusal(layer: nn.Module) -> str | None:
    """Why a layer's class or options must not be changed, or None."""
    if is_frozen(layer):
        return "is frozen; call bn.unfreeze(net) first, and freeze again afterwards"
    made = modes.class_with_modes(layer)
    if isinstance(made, str):
        return f"is a {type(layer).__qualname__}, which may do more than torch.nn.BatchNorm*d: it {made}"
    return None


def our_class(layer: nn.Module) -> type[nn.Module] | None:
    """This package's class that a layer is or can become without knowing its input."""
    return type(layer) if isinstance(layer, ours.BatchNorm) else _PAIRS.get(type(layer))


def _checked_options(to: str, options: dict[str, Any]) -> dict[str, Any]:
    values = {table.ATTRIBUTES.get(name, name): value for name, value in options.items()}
    if "decay" in values:
        if "momentum" in values:
            raise InputError("convert: momentum and decay are two names for one number; give one of them")
        values["momentum"] = 1 - values.pop("decay")
    if values and to != "batchnorm":
        raise InputError(f"convert: options ({', '.join(options)}) go with to='batchnorm' alone")
    unknown = values.keys() - {"eps", "momentum", *table.DEFAULTS}
    if unknown:
        known = ", ".join(["eps", "momentum", "decay", *table.DEFAULTS])
        raise InputError(f"convert: unknown option {', '.join(sorted(unknown))}; there are {known}")
    trial = ours.BatchNorm1d(1)
    for name, value in values.items():
        setattr(trial, name, value)
    kwargs = {k: v for k, v in values.items() if k in ("eps", "momentum")}
    ours.BatchNorm1d(1, **kwargs)
    return values


def _shapes(net: nn.Module, example: Example, kind: type[nn.Module]) -> dict[int, set[tuple[int, ...]]]:
    """The shapes of the inputs of every layer of a kind, by the layer's id."""
    watched = copy_of(net, training=False)
    found: dict[int, set[tuple[int, ...]]] = {}
    for module, twin in zip(net.modules(), watched.modules(), strict=True):
        if isinstance(module, kind):
            twin.register_forward_pre_hook(_noting_shapes(found.setdefault(id(module), set())))
    run_example(watched, example)
    return found


def _noting_shapes(found: set[tuple[int, ...]]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: found.update(tuple(x.shape) for x in args[:1] if isinstance(x, Tensor))


def _target(layer: nn.Module, to: str, shapes: set[tuple[int, ...]], options: dict[str, Any]) -> type[nn.Module] | str:
    """The class that the layer becomes, or why it cannot."""
    if not isinstance(layer, _BatchNorm):
        return _of_sample(layer, shapes)
    reason = refusal(layer)
    if reason is not None:
        return reason
    if to in _BY_SAMPLE:
        return _by_sample(layer, to, shapes)
    target = _class(layer, to, min((len(shape) for shape in shapes), default=None))
    if isinstance(target, str) or not issubclass(target, ours.BatchNorm):
        return target
    try:
        plain = layer
        if type(layer) is not target and not issubclass(target, foreign.ForeignBatchNorm):
            plain = target(layer.num_features, track_running_stats=layer.track_running_stats, device="meta")
        together = {**table.of(layer), **options}
        if "affine_by" not in options and not together["domains"] and together["affine_by"] == "domain":
            together["affine_by"] = "shared"  # those of the domain in use stay
        if together["affine_by"] != "shared":
            plain.affine = layer.affine
        table.check_together(together, plain, options.get("momentum", layer.momentum))
    except InputError as error:
        return f"cannot have these options: {error}"
    return target


def _class(layer: _BatchNorm, to: str, axes: int | None) -> type[nn.Module] | str:
    if not isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, ours.BatchNorm) and not is_plain(layer):
        return _foreign_class(layer, to)
    if isinstance(layer, foreign.ForeignBatchNorm) and to == "torch":
        return _only_ours(layer, to) or layer.theirs
    if to == "batchnorm" and isinstance(layer, ours.BatchNorm):
        return type(layer)
    if to == "sync" and isinstance(layer, nn.SyncBatchNorm):
        return nn.SyncBatchNorm
    if isinstance(layer, ours.BatchNorm) and (reason := _only_ours(layer, to)):
        return reason
    if to == "sync":
        return nn.SyncBatchNorm
    if isinstance(layer, nn.SyncBatchNorm):
        if axes not in _BY_AXES:
            return "is a SyncBatchNorm, which takes inputs of any rank; give an example that passes through it"
        pair = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[_BY_AXES[axes] - 1]
        return _PAIRS[pair] if to == "batchnorm" else pair
    plain = next((theirs for theirs, own in _PAIRS.items() if type(layer) in (own, theirs)), None)
    if plain is None:
        return f"is a {type(layer).__name__}, which torch.nn has no layer for"
    return _PAIRS[plain] if to == "batchnorm" else plain


def _foreign_class(layer: _BatchNorm, to: str) -> type[nn.Module] | str:
    """The class of a layer whose own class does more than normalize: its forward is kept, or else it is refused."""
    if to == "torch":
        return type(layer)
    if to == "sync":
        return (
            f"is a {type(layer).__qualname__}, of whose forward a SyncBatchNorm would keep the normalization alone; "
            "process_group='world' with to='batchnorm' keeps all of it"
        )
    made = modes.class_with_modes(layer)
    return made if not isinstance(made, str) else f"is a {type(layer).__qualname__}: it {made}"


def _with_group(name: str, layer: nn.Module, target: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """The options of one layer: its process group is kept where none is given, and then it is told its name."""
    if not issubclass(target, ours.BatchNorm):
        return options
    group = getattr(layer, "process_group", None)
    if isinstance(layer, nn.SyncBatchNorm):
        group = group or "world"
    group = options.get("process_group", group)
    return options if group is None else {**options, "process_group": group, "label": name}


def _only_ours(layer: ours.BatchNorm, to: str) -> str | None:
    for option in table.changed(layer):
        if option.name != "negative_slope" and not (option.name == "process_group" and to == "sync"):
            return f"has {option.name}={getattr(layer, option.name)!r}, which torch.nn's layers lack"
    return None


def _own(layer: nn.Module) -> dict[str, Any]:
    """The attributes that are no registries of nn.Module."""
    registries = nn.Module().__dict__.keys() - {"training"}
    return {k: v for k, v in layer.__dict__.items() if k not in registries and k not in ("training", _MEMORY)}


def _leave_ours(layer: nn.Module, kind: type[nn.Module]) -> None:
    widen_parameters(layer)
    group = layer.__dict__.get("process_group")
    for name in (*table.DEFAULTS, *table.STATE, *FLAGS):
        layer.__dict__.pop(name, None)
    if kind is nn.SyncBatchNorm:
        layer.__dict__["process_group"] = None if group == "world" else group


def _restoring(layer: nn.Module) -> Callable[[], None]:
    def do() -> None:
        original: Original = layer.__dict__.pop(_MEMORY)
        if isinstance(layer, ours.BatchNorm):
            for option in table.TABLE:
                if option.rows:
                    setattr(layer, option.name, original.attributes.get(option.name, option.default))
        foreign.release(layer, original.kind)
        for name, shape in original.shapes.items():
            parameter = layer._parameters.get(name)
            if parameter is not None and parameter.shape != shape:
                wide = parameter.detach().reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
                layer._parameters[name] = nn.Parameter(wide, requires_grad=parameter.requires_grad)
        for name in _own(layer).keys() - original.attributes.keys():
            del layer.__dict__[name]
        layer.__dict__.update(original.attributes)
        for name in layer._buffers.keys() - original.buffers:
            del layer._buffers[name]
            layer._non_persistent_buffers_set.discard(name)
        for name in original.buffers:
            if layer._buffers.get(name) is None:
                value = original.values.get(name)
                layer.register_buffer(name, None if value is None else value.clone())
        for name in original.values.keys() & {"weight", "bias"}:
            value, parameter = original.values[name], layer._parameters[name]
            if value is None:
                layer._parameters[name] = None
            elif parameter is not None:
                with torch.no_grad():
                    parameter.copy_(value)

    return do


def _loses_rows(layer: nn.Module) -> bool:
    """Whether reverting would drop statistics that differ from those it keeps."""
    if not isinstance(layer, ours.BatchNorm):
        return False
    now, before = table.rows(layer.__dict__), table.rows(layer.__dict__[_MEMORY].attributes)
    for axis in (0, 1):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = layer._buffers.get(name)
            if value is None or now[axis] in (0, before[axis]):
                continue
            each = value.reshape(*(max(n, 1) for n in now), -1)
            if bool((each != each.narrow(axis, 0, 1)).any()):
                return True
    return _loses_affine_rows(layer)


def _loses_affine_rows(layer: ours.BatchNorm) -> bool:
    """The same of gamma and beta."""
    now, before = table.affine_rows(layer.__dict__), table.affine_rows(layer.__dict__[_MEMORY].attributes)
    for key in ("weight", "bias"):
        first = layer._parameters.get(key)
        if first is None or now == before:
            continue
        others = [layer._parameters[f"{key}_{k}"] for k in range(1, now[0])]
        if any(other is not None and not torch.equal(other, first) for other in others):
            return True
        if now[1] and bool((first != first[:1]).any()):
            return True
    return False


def _returning(net: nn.Module, stand_in: Absorbed) -> Callable[[], None]:
    def do() -> None:
        original: nn.Module = stand_in.__dict__[_ABSORBED]
        replace_module(net, stand_in, original.train(stand_in.training))

    return do


def _own_forward(module: nn.Module) -> Callable[[], None]:
    def do() -> None:
        module.__class__ = vars(type(module))["original_kind"]

    return do
