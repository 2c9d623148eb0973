"""Batch normalization of other frameworks' files and states, loaded into our layers and written back.

`formats` reads and writes; here layers are matched, checked and changed. No framework is needed, and no pickle is
executed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import nn

from batchnorm.errors import DataError, InputError
from batchnorm.nn import modes, options
from batchnorm.nn.batch_norm import BatchNorm
from batchnorm.population.formats import recognition, writing
from batchnorm.population.formats.conventions import CONVENTIONS
from batchnorm.population.formats.records import Checkpoint, ForeignBatchNorm
from batchnorm.writing import write_bytes

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class LoadedStatistics:
    """What `load_statistics` took a file or state for, and what it loaded where.

    Args:
        framework: its key, such as "keras3".
        kind: the framework's name and the kind of file.
        layers: our names to theirs.
        notes: what the file does not say and was assumed.
    """

    framework: str
    kind: str
    layers: dict[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        pairs = ", ".join(f"{ours!r} from {theirs!r}" for ours, theirs in self.layers.items())
        return "\n".join([f"{self.kind}: {len(self.layers)} batch normalizations, {pairs}", *self.notes])


def read_statistics(file_or_state: Any, framework: str | None = None) -> Checkpoint:
    """The batch normalizations of another framework's file or state, without a network.

    Args:
        file_or_state: as for `load_statistics`.
        framework: whose it is; by default that is recognized by the content.

    Returns:
        The record: framework, kind of file, and the layers with their vectors, momentum, epsilon and kind of variance.

    Raises:
        DataError: a file that holds no batch normalization or cannot be read.
        InputError: a framework that is unknown, or whose file this is not.
        MissingDependencyError: the package that reads such files is not installed.

    Source: docs/frameworks.md, with each framework's rules and versions.

    Examples:
        >>> state = {"params": {"bn": {"scale": np.ones(1), "bias": np.zeros(1)}}}
        >>> state["batch_stats"] = {"bn": {"mean": np.zeros(1), "var": np.ones(1)}}
        >>> read_statistics(state).layers[0].decay
        0.99
    """
    return recognition.read(file_or_state, framework)


def load_statistics(
    net: nn.Module,
    file_or_state: Any,
    framework: str | None = None,
    layers: Mapping[str, str] | None = None,
    *,
    decay: float | None = None,
    eps: float | None = None,
    running_var: str | None = None,
    frozen: bool = False,
) -> LoadedStatistics:
    """Load the batch normalizations of another framework's file or state into those of ``net``, in place.

    gamma, beta, mean and variance are copied; momentum, epsilon, the kind of variance and the way of averaging are
    translated and set, so that inference *and* further training are the other framework's. Layers of torch.nn become
    ours. Of what is trained elsewhere nothing else is loaded.

    Args:
        net: the network.
        file_or_state: a path, or a nested dictionary of arrays of any library. The page "Batch norm in fifteen
            frameworks" lists the files.
        framework: whose it is, such as "keras2"; by default that is recognized by the content.
        layers: our names to theirs. By default layers are matched by equal names, or in order, if the file tells the
            order of its model and numbers and sizes agree.
        decay: share of the old statistics, and
        eps: epsilon, where the file does not hold them; by default the framework's own.
        running_var: "biased" or "unbiased", the variance that the framework kept, where the file does not tell. By
            default the framework's rule: Keras 2 keeps the unbiased variance of images and volumes, if the file does
            not say ``fused=False``.
        frozen: load for inference alone: the layers normalize by the running statistics and update nothing, in training
            as well. It is needed for layers whose training goes on differently here, which are refused without it.

    Returns:
        The format that the file was taken for, and what was loaded where.

    Raises:
        DataError: a file that holds no batch normalization or cannot be read.
        InputError: layers that do not match (numbers, names, sizes, gamma or beta on one side alone, a negative
            variance, values that are not finite), or that train by another rule; the network is then as it was.
        MissingDependencyError: the package that reads such files is not installed.

    Source: docs/frameworks.md, with each framework's rules and versions.

    Examples:
        >>> from batchnorm import BatchNorm1d
        >>> state = {"params": {"bn": {"scale": np.ones(1), "bias": np.zeros(1)}}}
        >>> state["batch_stats"] = {"bn": {"mean": np.zeros(1), "var": np.ones(1)}}
        >>> print(load_statistics(BatchNorm1d(1), state).kind)
        Flax linen (variables of Flax linen)
    """
    if running_var not in (None, "biased", "unbiased"):
        raise InputError(f"load_statistics: got running_var={running_var!r}; expected 'biased' or 'unbiased'")
    checkpoint = recognition.read(file_or_state, framework, decay)
    return _load(net, checkpoint, layers, "load_statistics", decay, eps, running_var, frozen)


def load_keras(
    net: Net,
    path: str | os.PathLike[str],
    *,
    layers: Mapping[str, str] | None = None,
    decay: float | None = None,
    eps: float | None = None,
    running_var: str | None = None,
    frozen: bool = False,
) -> Net:
    """Load the batch normalizations of a Keras file into those of ``net``, in place.

    `load_statistics` for files of Keras, which returns the network: ``momentum = 1 - Keras' momentum``, ``eps = Keras'
    epsilon``. The variance is *biased* in Keras 3; in Keras 2 it is *unbiased* over images and volumes (the fused
    layer) and biased elsewhere. ``trainable=False`` becomes inference mode in training, as Keras has it.

    Args:
        net: the network.
        path: a ``.keras`` archive, a ``.weights.h5``, a ``.weights.json`` with its shards, or an ``.h5``.
        layers: our names to Keras' (the first column of `read_statistics`, or the path in the file, or the layer's own
            name).
        decay: Keras' ``momentum``, and
        eps: Keras' ``epsilon``, where the file holds weights alone; by default Keras' own 0.99 and 1e-3.
        running_var: "biased" or "unbiased", where the rule above does not hold (a file of weights does not say
            ``fused=False``).
        frozen: as in `load_statistics`.

    Returns:
        The network.

    Raises:
        DataError: a file that holds no batch normalization or cannot be read.
        InputError: as `load_statistics`.
        MissingDependencyError: h5py is not installed.

    Source: `keras.layers.BatchNormalization`; docs/frameworks.md has the rules with versions.

    Examples:
        >>> net = load_keras(net, "model.keras")  # doctest: +SKIP
    """
    load_keras_path = _only(recognition.read(path), ("keras2", "keras3"), "load_keras", path)
    _load(net, load_keras_path, layers, "load_keras", decay, eps, running_var, frozen)
    return net


def load_flax(
    net: Net,
    variables: Any,
    *,
    layers: Mapping[str, str] | None = None,
    decay: float | None = None,
    eps: float | None = None,
) -> Net:
    """Load the batch normalizations of Flax variables into those of ``net``, in place.

    `load_statistics` for Flax, which returns the network.

    Args:
        net: the network.
        variables: of linen, ``{"params": {... "scale", "bias"}, "batch_stats": {... "mean", "var"}}``, or a TrainState;
            of nnx, ``nnx.state(model)`` or its pure dictionary; or a file of ``flax.serialization.to_bytes``.
        layers: our names to Flax' paths, joined by "/". By default in order, which Flax' dicts tell only where all are
            numbered layers of one module (``BatchNorm_0``, ``BatchNorm_1``, ...) or all have different sizes.
        decay: ``momentum`` and
        eps: ``epsilon`` of the modules, which Flax does not save; by default Flax' own 0.99 and 1e-5.

    Returns:
        The network.

    Raises:
        DataError: no batch normalization in the variables, or a file that cannot be read.
        InputError: as `load_statistics`, or an order that cannot be told.
        MissingDependencyError: msgpack is not installed (for files).

    Source: `flax.linen.BatchNorm` and `flax.nnx.BatchNorm`; docs/frameworks.md has the rules with versions.

    Examples:
        >>> variables = {"params": {"bn": {"scale": np.ones(1), "bias": np.zeros(1)}}}
        >>> variables["batch_stats"] = {"bn": {"mean": np.zeros(1), "var": np.full(1, 3.0)}}
        >>> load_flax(nn.BatchNorm1d(1), variables).running_var
        tensor([3.])
    """
    found = _only(recognition.read(variables), ("flax", "nnx"), "load_flax", variables)
    _load(net, found, layers, "load_flax", decay, eps, None, False)
    return net


def _only(found: Checkpoint, frameworks: tuple[str, ...], verb: str, source: Any) -> Checkpoint:
    if found.framework not in frameworks:
        shown = source if isinstance(source, (str, os.PathLike)) else "this state"
        raise DataError(f"{verb}: {shown} is of {_title(found)}; load_statistics reads it")
    return found


def _title(found: Checkpoint) -> str:
    return f"{CONVENTIONS[found.framework].title} ({found.kind})"


def read_keras(path: str | os.PathLike[str]) -> list[ForeignBatchNorm]:
    """The batch normalizations of a Keras file, in the order of its model."""
    return list(recognition.read(path).layers)


# Matching


def _load(
    net: nn.Module,
    found: Checkpoint,
    names: Mapping[str, str] | None,
    verb: str,
    decay: float | None,
    eps: float | None,
    running_var: str | None,
    frozen: bool,
) -> LoadedStatistics:
    modes.check(net, verb)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if names is not None:
        pairs = _by_name(layers, (*found.layers, *found.doubtful), names, verb)
    else:
        pairs = _by_equal_names(layers, found.layers) or _in_order(layers, found, verb)
    keeps = CONVENTIONS[found.framework].keeps_settings
    pairs = [(name, _settled(verb, name, layers[name], f, decay, eps, running_var, frozen)) for name, f in pairs]
    for name, foreign in pairs:
        _check(verb, name, layers[name], foreign)
    modes.set_mode(net)  # torch's layers become ours
    with torch.no_grad():
        for name, foreign in pairs:
            _copy(layers[name], foreign, keeps, decay, eps)
    notes = tuple(n for n in found.notes if decay is None or eps is None or "epsilon" not in n)
    return LoadedStatistics(found.framework, _title(found), {ours: f.name for ours, f in pairs}, notes)


def _by_name(
    layers: Mapping[str, nn.Module], found: Iterable[ForeignBatchNorm], names: Mapping[str, str], verb: str
) -> list[tuple[str, ForeignBatchNorm]]:
    known: dict[str, list[ForeignBatchNorm]] = {}
    for f in found:
        for alias in {f.name, *f.aliases}:
            known.setdefault(alias, []).append(f)
    exact = {f.name: f for f in found}
    if unknown := names.keys() - layers.keys():
        raise InputError(f"{verb}: the network has no batch normalization {sorted(unknown)}, but {sorted(layers)}")
    if missing := set(names.values()) - known.keys():
        raise InputError(f"{verb}: the checkpoint has no batch normalization {sorted(missing)}, but {sorted(exact)}")
    if double := [name for name in names.values() if name not in exact and len(known[name]) > 1]:
        raise InputError(f"{verb}: {double} are the names of several layers; give the paths, out of {sorted(exact)}")
    return [(ours, exact.get(theirs, known[theirs][0])) for ours, theirs in names.items()]


def _by_equal_names(
    layers: Mapping[str, nn.Module], found: Iterable[ForeignBatchNorm]
) -> list[tuple[str, ForeignBatchNorm]]:
    """The pairs of equal names, dots and slashes alike, if all names on both sides are equal; else nothing."""
    theirs = {f.name.replace("/", "."): f for f in found}
    return [(name, theirs[name]) for name in layers] if theirs.keys() == layers.keys() else []


def _in_order(layers: Mapping[str, nn.Module], found: Checkpoint, verb: str) -> list[tuple[str, ForeignBatchNorm]]:
    theirs = list(found.layers)
    names = [f.name for f in theirs]
    if len(layers) != len(theirs):
        raise InputError(
            f"{verb}: the network has {len(layers)} batch normalizations, the checkpoint {len(theirs)} "
            f"({names}); give layers={{ours: theirs}}"
        )
    if not found.ordered:
        sizes = {f.mean.size: f for f in theirs}
        if len(sizes) != len(theirs):
            raise InputError(
                f"{verb}: the names {names} do not tell their order in the network, nor do their "
                "sizes; give layers={ours: theirs}"
            )
        channels = [int(layer.running_mean.numel()) for layer in layers.values()]  # type: ignore[operator]
        theirs = [sizes.get(count, theirs[0]) for count in channels]
    return list(zip(layers, theirs, strict=True))


def _settled(
    verb: str,
    name: str,
    layer: Any,
    foreign: ForeignBatchNorm,
    decay: float | None,
    eps: float | None,
    running_var: str | None,
    frozen: bool,
) -> ForeignBatchNorm:
    """What the file leaves open, told by our layer and by the options."""
    if foreign.obstacle and not (frozen or foreign.frozen):
        raise InputError(
            f"{verb}: layer {name!r} cannot be trained further as {foreign.name!r} was: {foreign.obstacle}. "
            "frozen=True loads it for inference alone"
        )
    gamma, beta = foreign.gamma, foreign.beta
    if foreign.loose:
        if (layer.weight is None) == (layer.bias is None):
            raise InputError(
                f"{verb}: {foreign.name!r} holds three vectors, with gamma or beta alone, and layer {name!r} has "
                f"{'both' if layer.bias is not None else 'neither'}. Take away the one that is missing there "
                "(scale=False: layer.register_parameter('weight', None); center=False: bias=False)"
            )
        gamma, beta = (foreign.loose[0], None) if layer.bias is None else (None, foreign.loose[0])
    if decay is None and math.isnan(foreign.decay):
        raise InputError(f"{verb}: the file does not tell the decay of {foreign.name!r}; give decay=")
    variance = running_var or foreign.variance
    if variance == "fused":
        spatial = isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d))
        variance = "unbiased" if spatial else "biased"
    return replace(
        foreign,
        gamma=gamma,
        beta=beta,
        decay=foreign.decay if decay is None else decay,
        eps=foreign.eps if eps is None else eps,
        variance=variance,
        frozen=frozen or foreign.frozen,
    )


def _check(verb: str, name: str, layer: Any, foreign: ForeignBatchNorm) -> None:
    what = f"{verb}: layer {name!r} and {foreign.name!r} do not match: "
    if layer.running_mean is None:
        raise InputError(what + "the layer keeps no running statistics")
    expected: Iterable[tuple[str, Any, Any]] = (
        ("running_mean", layer.running_mean, foreign.mean),
        ("running_var", layer.running_var, foreign.var),
        ("weight", layer.weight, foreign.gamma),
        ("bias", layer.bias, foreign.beta),
    )
    for key, ours, theirs in expected:
        if (ours is None) != (theirs is None):
            raise InputError(f"{what}{key} is {'missing' if ours is None else 'there'} in ours alone")
        if ours is None:
            continue
        if tuple(ours.shape) != theirs.shape:
            raise InputError(f"{what}{key} has shape {tuple(ours.shape)} in ours, {theirs.shape} in the checkpoint")
        if not np.isfinite(theirs).all() or (key == "running_var" and (theirs < 0).any()):
            raise InputError(f"{what}its {key} has values that are negative or not finite")
    if not (0 <= foreign.decay <= 1 and 0 <= foreign.eps < math.inf):
        raise InputError(f"{what}momentum {foreign.decay} or epsilon {foreign.eps} is out of range")


def _copy(layer: nn.Module, foreign: ForeignBatchNorm, keeps: bool, decay: float | None, eps: float | None) -> None:
    assert isinstance(layer, BatchNorm)
    for ours, theirs in (
        (layer.running_mean, foreign.mean),
        (layer.running_var, foreign.var),
        (layer.weight, foreign.gamma),
        (layer.bias, foreign.beta),
    ):
        if ours is not None:
            ours.copy_(torch.from_numpy(np.array(theirs, dtype=np.float64)))
    if foreign.batches is not None and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(foreign.batches)
    if not keeps or decay is not None:
        layer.momentum, layer.running = 1 - foreign.decay, foreign.running
    if not keeps or eps is not None:
        layer.eps = foreign.eps
    layer.running_var_kind = foreign.variance
    if foreign.frozen:
        modes.set_mode(layer, source="running", update="never", affine=False)


# Writing


@dataclass(frozen=True)
class SavedStatistics:
    """What `save_statistics` wrote, and what of it the file does not hold.

    Args:
        framework: the framework's key, such as "keras3".
        path: the file.
        layers: our names to theirs.
        notes: what the file does not hold of the layers, and how the other framework is told.
    """

    framework: str
    path: Path
    layers: dict[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        pairs = ", ".join(f"{ours!r} as {theirs!r}" for ours, theirs in self.layers.items())
        title = CONVENTIONS[self.framework].title
        return "\n".join([f"{self.path} ({title}): {len(self.layers)} batch normalizations, {pairs}", *self.notes])


def save_statistics(
    net: nn.Module,
    path: str | os.PathLike[str],
    framework: str | None = None,
    layers: Mapping[str, str] | None = None,
    *,
    like: str | os.PathLike[str] | None = None,
    frozen: bool = False,
) -> SavedStatistics:
    """Write the batch normalizations of ``net`` as a file of another framework.

    The variance is of the kind that the layer keeps (``running_var_kind``). Momentum, epsilon and what is frozen are in
    models of Keras and in files of Caffe alone; the notes that are returned say what to give to the constructor of
    another framework. Darknet has no epsilon: the variance that it gets is (sqrt(running_var + eps) - 1e-6)^2. Haiku,
    Equinox and Caffe divide their averages by 1 - decay^t: t is the layer's number of batches where it averages so,
    else one from which that is 1.

    Args:
        net: the network.
        path: of the file; it is written beside and moved.
        framework: whose file, such as "mlx"; by default the name's end tells it: ``.weights.h5`` (Keras 3), ``.h5``
            (Keras 2), ``.msgpack`` (Flax linen), ``.pdparams`` (Paddle), ``.ckpt`` (MindSpore), ``.eqx`` (Equinox),
            ``.caffemodel`` (Caffe), ``.weights`` (Darknet). ``.safetensors`` and ``.npz`` need it.
        layers: our names to theirs; by default ours, and for Keras 3 the paths of a Sequential model. With ``like``,
            by default the layers are matched as in `load_statistics`.
        like: a file of the whole model that the framework wrote, of Keras, Haiku (``.npz``), Equinox, Caffe or
            Darknet; all that it holds besides the batch normalizations is written as it is, into a file of its kind. A
            ``.keras`` archive or an ``.h5`` of a model gets the layers' momentum, epsilon and ``trainable`` as well.
            Darknet needs it, with its ``.cfg`` beside it, and Equinox, unless batch normalizations are all that the
            model holds. Without it Caffe's Scale behind ``bn1`` is ``scale1``, and Haiku's vectors have the axes of
            (N, C), images or volumes.
        frozen: write for inference alone; in a model of Keras the layers then have ``trainable=False``. Layers that
            train by a rule of this package (``renorm``, ``ghost_size``, ``channel_groups``) are refused without it.

    Returns:
        What was written under which names, and what the file does not hold; the file is complete.

    Raises:
        InputError: no batch normalization, names that ``net`` does not have, a kind of file that is not written, or a
            layer that computes by a rule that the other framework does not have.
        WriteError: the file cannot be written, as on a full disk; an old one stays.
        MissingDependencyError: the package that writes such files is not installed.

    Source: docs/frameworks.md, with each framework's rules and versions.

    Examples:
        >>> save_statistics(net, "layers.npz", "mlx")  # doctest: +SKIP
    """
    verb, path = "save_statistics", Path(path)
    if like is None:
        return _save(net, path, framework, layers, verb, frozen)
    found = recognition.read(like, framework)
    ours = {name: replace(f, frozen=frozen or f.frozen) for name, f in _ours(net, verb, frozen)}
    modules = {name: net.get_submodule(name) for name in ours}
    if layers is not None:
        pairs = _by_name(modules, (*found.layers, *found.doubtful), layers, verb)
    else:
        pairs = _by_equal_names(modules, found.layers) or _in_order(modules, found, verb)
    for name, theirs in pairs:
        if ours[name].mean.shape != theirs.mean.shape:
            raise InputError(
                f"{verb}: layer {name!r} has {ours[name].mean.size} channels, {theirs.name!r} {theirs.mean.size}"
            )
    named = {theirs.name: replace(ours[name], obstacle=theirs.obstacle) for name, theirs in pairs}
    write_bytes(path, writing.content_like(Path(like), path, found.framework, named, verb))
    held = {theirs.name: theirs for _, theirs in pairs}
    if found.framework in ("keras2", "keras3"):  # whose settings were written where the file has any
        again = recognition.read(path, found.framework)
        held = {f.name: f for f in (*again.layers, *again.doubtful)}
    notes = _untold(net, [(ours[name], held[theirs.name]) for name, theirs in pairs], found.framework)
    return SavedStatistics(found.framework, path, {name: theirs.name for name, theirs in pairs}, notes)


def _save(
    net: nn.Module,
    path: Path,
    framework: str | None,
    layers: Mapping[str, str] | None,
    verb: str,
    frozen: bool,
) -> SavedStatistics:
    found = _ours(net, verb, frozen)
    key = writing.framework_of(path, framework, verb)
    theirs = _theirs(found, key, layers, verb)
    named = [(name, f) for name, (_, f) in zip(theirs, found, strict=True)]
    write_bytes(path, writing.content(named, key, path, verb))
    row = CONVENTIONS[key]
    held: dict[str, Any] = {"variance": row.variance, "frozen": False}
    if key != "caffe":  # whose files hold the rest
        held |= {"decay": row.decay or math.nan, "eps": row.eps, "running": row.running}
    told = [(f, replace(f, **held)) for _, f in found]
    return SavedStatistics(key, path, dict(zip((n for n, _ in found), theirs, strict=True)), _untold(net, told, key))


def _untold(net: nn.Module, pairs: list[tuple[ForeignBatchNorm, ForeignBatchNorm]], framework: str) -> tuple[str, ...]:
    """What the file does not say of our layers, as it is read; layers of which the same is to be said together."""
    said: dict[str, list[str]] = {}
    for ours, read in pairs:
        for text in _differences(ours, read, framework):
            said.setdefault(text, []).append(ours.name)
        modes_told = _MODES if ours.frozen else ()
        if shown := options.spelled_out(net.get_submodule(ours.name), {*_TOLD, *modes_told}):
            said.setdefault(f"{shown} is not in the file", []).append(ours.name)
    left = [name for name, m in net.named_modules() if _is_norm(m) and m.running_mean is None]
    notes = [f"{', '.join(map(repr, names))}: {text}" for text, names in said.items()]
    return (
        *notes,
        *([f"not written, since they keep no running statistics: {', '.join(map(repr, left))}"] * bool(left)),
    )


def _differences(ours: ForeignBatchNorm, read: ForeignBatchNorm, framework: str) -> Iterator[str]:
    row = CONVENTIONS[framework]
    word, share = row.momentum
    decay = math.isclose(ours.decay, read.decay, rel_tol=1e-6, abs_tol=1e-9)
    if framework != "darknet" and not (decay and math.isclose(ours.eps, read.eps, rel_tol=1e-6)):
        momentum = ours.decay if share == "old" else 1 - ours.decay
        yield f"the file does not hold {word}={round(momentum, 10):g} and epsilon={ours.eps:g}; set them there"
    if ours.frozen and not read.frozen and read.obstacle is None:
        how = "trainable=False" if framework in ("keras2", "keras3") else "inference mode in training"
        yield f"it is frozen here, which the file does not hold; set {how} there"
    kind = read.variance
    if kind == "fused":
        kind = "unbiased" if ours.rank > 3 else "biased"
    if ours.variance != kind and framework != "darknet":
        yield f"its variance is {ours.variance}, and training there goes on with the {kind} one"
    kept = "debiased" if ours.running == "ema" and read.running == "debiased" else read.running  # written as such
    if ours.running != kept and not (framework == "caffe" and ours.running == "cumulative"):
        yield f"its average is {ours.running}, and training there goes on with a plain moving average"


def to_keras(net: nn.Module, *, frozen: bool = False) -> dict[str, list[np.ndarray[Any, Any]]]:
    """The batch normalizations of ``net``, each as the list that Keras' ``layer.set_weights`` takes.

    gamma, beta (where there are any), moving mean, moving variance; the variance is *biased* where the layer keeps it
    so (``running_var_kind``), else it is what torch keeps, *unbiased*. Pass ``momentum=layer.decay, epsilon=layer.eps``
    to Keras' constructor, and ``trainable=False`` for a layer that is frozen here.

    Args:
        net: the network.
        frozen: as in `save_statistics`.

    Returns:
        For each layer's name its list of NumPy arrays (C,).

    Raises:
        InputError: no batch normalization, or a layer that computes by a rule that Keras does not have.

    Source: `keras.layers.BatchNormalization`; docs/frameworks.md has the rules with versions.

    Examples:
        >>> [each.shape for each in to_keras(nn.Sequential(nn.BatchNorm1d(3)))["0"]]
        [(3,), (3,), (3,), (3,)]
    """
    return {name: list(writing.vectors(f).values()) for name, f in _ours(net, "to_keras", frozen)}


def save_keras(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    layers: Mapping[str, str] | None = None,
    like: str | os.PathLike[str] | None = None,
    frozen: bool = False,
) -> SavedStatistics:
    """Write the batch normalizations of ``net`` as a file of Keras weights: `save_statistics` for Keras.

    A name that ends in ``.weights.h5`` makes a file for Keras 3, ``model.load_weights(path, skip_mismatch=True)``; any
    other an ``.h5`` for Keras 2, ``load_weights(path, by_name=True)``. With ``like``, a file of the whole model, all
    else in it stays, and a model's config gets momentum, epsilon and ``trainable``.

    Args:
        net: the network.
        path: of the file; it is written beside and moved.
        layers: our names to Keras'. For Keras 3 these are paths of attributes ("bn1", "layers/batch_normalization"); by
            default "layers/batch_normalization", "layers/batch_normalization_1", ..., as in a Sequential model. For
            Keras 2 they are names of layers; by default ours.
        like: a ``.keras``, ``.weights.h5`` or ``.h5`` that Keras wrote of the model; as in `save_statistics`.
        frozen: write for inference alone; as in `save_statistics`.

    Returns:
        What was written, and what the file does not hold.

    Raises:
        InputError: as `save_statistics`.
        MissingDependencyError: h5py is not installed.

    Source: `keras.layers.BatchNormalization`; docs/frameworks.md has the rules with versions.

    Examples:
        >>> save_keras(net, "layers.weights.h5")  # doctest: +SKIP
    """
    if like is not None:
        framework = _only(recognition.read(like), ("keras2", "keras3"), "save_keras", like).framework
        return save_statistics(net, path, framework, layers, like=like, frozen=frozen)
    framework = "keras3" if str(path).endswith(".weights.h5") else "keras2"
    return _save(net, Path(path), framework, layers, "save_keras", frozen)


def to_flax(net: nn.Module, *, layers: Mapping[str, str] | None = None, frozen: bool = False) -> dict[str, Any]:
    """The batch normalizations of ``net`` as Flax variables: ``{"params": ..., "batch_stats": ...}``, nested.

    Names of modules become nested keys; ``layers`` maps our names to Flax' paths, joined by "/". The variance is
    *biased* where the layer keeps it so, else what torch keeps. Flax takes ``momentum=layer.decay,
    epsilon=layer.eps`` in its constructor.

    Args:
        net: the network.
        layers: our names to Flax' paths; by default ours, with "/" in place of dots.
        frozen: as in `save_statistics`.

    Returns:
        Nested dictionaries of NumPy arrays (C,).

    Raises:
        InputError: no batch normalization, names that ``net`` does not have, or a layer that computes by a rule that
            Flax does not have.

    Source: `flax.linen.BatchNorm`; docs/frameworks.md has the rules with versions.

    Examples:
        >>> to_flax(nn.Sequential(nn.BatchNorm1d(1)))["batch_stats"]["0"]["var"]
        array([1.], dtype=float32)
    """
    found = _ours(net, "to_flax", frozen)
    names = _theirs(found, "flax", layers, "to_flax")
    return writing.tree([(name, f) for name, (_, f) in zip(names, found, strict=True)])


def _theirs(
    found: list[tuple[str, ForeignBatchNorm]], framework: str, layers: Mapping[str, str] | None, verb: str
) -> list[str]:
    """The names of layers there."""
    ours, given = [name for name, _ in found], dict(layers or {})
    if unknown := given.keys() - set(ours):
        raise InputError(f"{verb}: the network has no batch normalization {sorted(unknown)}")
    theirs = writing.default_names(ours, framework, given)
    if len(set(theirs)) < len(theirs):
        raise InputError(f"{verb}: two layers have one name there: {theirs}")
    return theirs


_MODES = ("source", "update", "trains_affine")  # all three make a layer frozen
_TOLD = ("running", "running_var_kind", "nonfinite", "pool", "batch_first", "max_steps", "negative_slope")
_RULES = ("renorm", "ghost_size", "ghost_update", "channel_groups", "example_weight", "domains", "affine_by")


def _ours(net: nn.Module, verb: str, frozen: bool) -> list[tuple[str, ForeignBatchNorm]]:
    found = []
    for name, m in net.named_modules():
        if not _is_norm(m) or m.running_mean is None:
            continue
        if m.running_mean.ndim > 1:
            raise InputError(
                f"{verb}: layer {name!r} keeps {tuple(m.running_mean.shape)} statistics, those of domains or time "
                "steps, and other frameworks one set; bn.convert(net, domains=0) keeps those of the domain in use"
            )
        _check_rule(m, name, verb, frozen)
        found.append((name, _of_layer(name, m)))
    if not found:
        raise InputError(f"{verb}: the network has no batch normalization with running statistics")
    return found


def _is_norm(module: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _check_rule(m: nn.Module, name: str, verb: str, frozen: bool) -> None:
    """Raises for a layer that computes by a rule which no other framework has."""
    others = {option.name for option in options.TABLE if option.name not in _RULES}
    rules = options.spelled_out(m, others)
    alike = getattr(m, "example_weight", 0.0) == 0.0
    if rules is None or (frozen and alike):
        return
    way = "frozen=True writes it for inference alone" if alike else "bn.convert(net, example_weight=0.0) takes it away"
    raise InputError(f"{verb}: layer {name!r} has {rules}, a rule that the other framework does not have; {way}")


def _of_layer(name: str, m: nn.modules.batchnorm._BatchNorm) -> ForeignBatchNorm:
    def array(value: Any) -> Any:
        return None if value is None else value.detach().cpu().float().numpy().copy()

    mean, var, gamma, beta = (array(v) for v in (m.running_mean, m.running_var, m.weight, m.bias))
    kind = "cumulative" if m.momentum is None else getattr(m, "running", "ema")
    rank = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    own = options.of(m)
    return ForeignBatchNorm(
        name,
        mean,
        var,
        gamma,
        beta,
        math.nan if kind == "cumulative" or m.momentum is None else 1 - m.momentum,
        m.eps,
        variance=own["running_var_kind"],
        running=kind,
        batches=None if m.num_batches_tracked is None else int(m.num_batches_tracked),
        frozen=own["source"] == "running" and own["update"] == "never" and not own["trains_affine"],
        rank=next((n for each, n in rank.items() if isinstance(m, each)), 2),
    )
