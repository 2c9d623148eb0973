"""Modes of a layer or a network: which statistics normalize, whether they update, whether gamma and beta train."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from batchnorm.errors import InputError
from batchnorm.nn import batch_norm as ours
from batchnorm.nn import foreign, options, saved_modes
from batchnorm.nn.saved_modes import Memory
from batchnorm.running import Accumulator
from batchnorm.undo import Attributes, Values, kept

Net = TypeVar("Net", bound=nn.Module)

OURS: dict[type[nn.Module], type[ours.BatchNorm]] = {
    nn.BatchNorm1d: ours.BatchNorm1d,
    nn.BatchNorm2d: ours.BatchNorm2d,
    nn.BatchNorm3d: ours.BatchNorm3d,
}


def set_mode(net: Net, *, source: str | None = None, update: str | None = None, affine: bool | None = None) -> Net:
    """Set three independent modes of every batch normalization of ``net``, in place.

    Modes hold through ``.train()``, ``.eval()``, ``.to()``, ``deepcopy`` and pickling, show in ``repr``, and travel
    in the metadata of a ``state_dict``, whose keys stay torch's. Layers of torch.nn become this package's: the same
    objects, with the same parameters, buffers, hooks and keys.

    Args:
        net: a layer or a network.
        source: which statistics normalize: "batch", "running", or "auto", which is the batch's in training and the
            running ones in evaluation, as torch. None leaves it as it is.
        update: whether a forward updates the running statistics: "never", "always", or "auto", which is in training,
            as torch. None leaves it as it is.
        affine: whether gamma and beta train. False takes their ``requires_grad`` and drops their gradients, so that no
            optimizer moves them; True gives back the ``requires_grad`` that was taken. None leaves it as it is.

    Returns:
        The network.

    Warns:
        UserWarning: modules of classes that are not torch's keep running statistics of their own, which this does not
            reach.

    Raises:
        InputError: no batch normalization, an unknown mode, a layer of a class with a life of its own, or
            ``source="running"`` or ``update="always"`` for a layer without running statistics. Nothing is changed.

    Source: this package; docs/modes.md.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> set_mode(net, source="running", affine=False)[1].extra_repr().split(", ")[-2:]
        ["source='running'", 'trains_affine=False']
    """
    change(net, "set_mode", source, update, affine)
    return net


@contextlib.contextmanager
def mode(
    net: nn.Module, *, source: str | None = None, update: str | None = None, affine: bool | None = None
) -> Iterator[None]:
    """`set_mode` for the body of a ``with``; all modes and classes are restored on leaving, by an error as well.

    Gradients of gamma and beta that ``affine=False`` drops are not restored.

    Args:
        net: a layer or a network.
        source, update, affine: as of `set_mode`.

    Returns:
        A context manager.

    Raises:
        InputError: as `set_mode`, on entering; nothing is then changed.

    Source: this package.

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> with mode(net, source="running", update="never"):
        ...     net(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [0.9999949932098389, 2.9999849796295166]
    """
    with kept(*change(net, "mode", source, update, affine)):
        yield


def no_update(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within it no forward changes running statistics: for probes, teachers and gradient penalties.

    Args:
        net: a layer or a network.

    Returns:
        A context manager.

    Raises:
        InputError: no batch normalization, or a layer of a class with a life of its own.

    Source: this package.

    Examples:
        >>> net = ours.BatchNorm1d(3)
        >>> with no_update(net):
        ...     _ = net(torch.randn(8, 3) + 5)
        >>> net.running_mean
        tensor([0., 0., 0.])
    """
    return mode(net, update="never")


@contextlib.contextmanager
def accumulate(net: nn.Module) -> Iterator[None]:
    """Merge the statistics of all forwards of the body, and update once, as one batch, on leaving.

    For gradient accumulation: the running statistics are those that the batch of all micro-batches would give (mean
    and variance pooled, so the variance *between* micro-batches is counted; unequal sizes count with their number of
    values). Each micro-batch is still normalized by its own statistics; `accumulate_exact` does that as the large
    batch does. On an error the running statistics stay as they were.

    Args:
        net: the network, with torch's batch normalization or this package's.

    Returns:
        A context manager.

    Raises:
        InputError: no batch normalization, a layer of a class with a life of its own, or an `accumulate` in another.

    Source: Chan, Golub & LeVeque 1983 (merging of moments).

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0))
        >>> with accumulate(net):
        ...     for x in torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]):
        ...         _ = net(x)
        >>> net[0].running_mean, net[0].running_var
        (tensor([4.]), tensor([6.6667]))
    """
    memories = change(net, "accumulate")
    layers = [before.layer for before in memories if before.layer.running_mean is not None]
    with kept(*memories, Attributes(layers, "_accumulator")):
        if any(layer._accumulator is not None for layer in layers):
            raise InputError("accumulate: the network is already accumulating; leave the outer block first")
        for layer in layers:
            assert layer.running_mean is not None
            layer._accumulator = Accumulator(layer.running_mean)
        yield
        _commit(layers)


@torch.no_grad()
def _commit(layers: list[ours.BatchNorm]) -> None:
    for layer in layers:
        done = layer._accumulator
        assert done is not None
        layer._accumulator = None
        # One value has no variance.
        layer._population().mix(torch.where(done.count > 1, done.count, 0.0), done.mean, done.var)


@contextlib.contextmanager
def transaction(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep the running statistics of the body only if the optimizer takes a step in it.

    Where a `GradScaler` finds infinite gradients and skips the step, where the code decides against it, and where an
    error is raised, the statistics, their counters and r and d go back to what they were on entering.

    Args:
        net: the network, with torch's batch normalization or this package's.
        optimizer: the one whose step decides; one that takes the scale itself (``fused=True``) counts as skipped when
            it found infinite gradients.

    Returns:
        A context manager.

    Raises:
        InputError: no batch normalization.

    Source: this package.

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with transaction(net, optimizer):
        ...     loss = net(torch.randn(8, 3) + 5).square().mean()
        ...     loss.backward()  # and no step
        >>> net[0].running_mean
        tensor([0., 0., 0.])
    """
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise InputError(f"transaction: {type(net).__name__} has no batch normalization")
    before = Values(b for layer in layers for b in layer.buffers(recurse=False))
    steps: list[bool] = []

    def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
        found = getattr(optimizer, "found_inf", None)  # set by a GradScaler for optimizers that unscale
        steps.append(found is None or not bool(found))

    hook = optimizer.register_step_post_hook(stepped)
    try:
        with kept(before, if_it_fails=True):
            yield
        if not any(steps):
            before.restore()
    finally:
        hook.remove()


def restore(layer: nn.Module, memory: Memory) -> None:
    """Class, modes and flags of the parameters as they were."""
    assert isinstance(layer, ours.BatchNorm)
    if layer.trains_affine != memory.mode["trains_affine"]:
        saved_modes.train_affine(layer, memory.mode["trains_affine"], memory.requires_grad)
        saved_modes.set_flags(layer, memory.requires_grad)
    for name, value in memory.mode.items():
        setattr(layer, name, value)
    for key in memory.added:
        layer.__dict__.pop(key, None)
    module: nn.Module = layer
    if type(module) is not memory.kind:
        foreign.release(layer, memory.kind)


def adopt(layer: nn.Module, requires_grad: dict[str, bool]) -> Memory:
    """Make a layer of torch.nn, or of a class made of it, one of ours, in place; returns what `restore` needs."""
    kind: type[nn.Module] = type(layer)
    before = dict(layer.__dict__)
    made = class_with_modes(layer)
    assert not isinstance(made, str)
    if made is not kind:
        foreign.adopt(layer, made)
    added = tuple(key for key in layer.__dict__ if key not in before)
    return Memory(kind, saved_modes.mode(layer), requires_grad, added)


def class_with_modes(layer: nn.Module) -> type[nn.Module] | str:
    """The class in which a layer has modes, its own if it has them already; or the reason why there is none."""
    if isinstance(layer, ours.BatchNorm):
        return foreign.obstacle(layer) or type(layer)
    return OURS.get(type(layer)) or foreign.counterpart(layer)


def check(net: nn.Module, verb: str, source: str | None = None, update: str | None = None) -> dict[str, nn.Module]:
    """The layers of ``net`` by name; raises for any that cannot have these modes."""
    if not isinstance(net, nn.Module):
        raise InputError(f"{verb}: got a {type(net).__name__}; expected a torch.nn.Module")
    layers: dict[str, nn.Module] = {
        n: m for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    if not layers:
        raise InputError(f"{verb}: {type(net).__name__} has no batch normalization")
    for name, layer in layers.items():
        _check(verb, name, layer, source, update)
    warn_of_strangers(net, verb, stacklevel=4)
    return layers


def warn_of_strangers(net: nn.Module, verb: str, stacklevel: int = 3) -> None:
    """Names modules that keep running statistics of a batch and are of no class that this package knows."""
    found = [
        f"'{name}' ({type(module).__name__})"
        for name, module in net.named_modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        and not type(module).__module__.startswith("batchnorm.")
        and all(isinstance(module._buffers.get(key), torch.Tensor) for key in ("running_mean", "running_var"))
        and hasattr(module, "momentum")  # frozen classes have none
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        warnings.warn(
            f"{verb}: {', '.join(found[:3])}{more} keep running statistics, are no batch normalization of torch.nn, "
            "and are left alone",
            stacklevel=stacklevel,
        )


class Before(NamedTuple):
    """A layer, and what it was."""

    layer: ours.BatchNorm
    memory: Memory

    def restore(self) -> None:
        restore(self.layer, self.memory)


def change(
    net: nn.Module, verb: str, source: str | None = None, update: str | None = None, affine: bool | None = None
) -> list[Before]:
    """Makes every layer one that has modes, and sets them, after all checks; returns what the layers were."""
    for name, value in (("source", source), ("update", update), ("trains_affine", affine)):
        if value is not None:
            options.check(name, value)
    layers = check(net, verb, source, update)
    flags = [saved_modes.flags(layer) for layer in layers.values()]  # before any changes: layers may share gamma
    memories: list[Before] = []
    for layer, before in zip(layers.values(), flags, strict=True):
        memory = adopt(layer, before)
        assert isinstance(layer, ours.BatchNorm)
        memories.append(Before(layer, memory))
        if source is not None:
            layer.source = source
        if update is not None:
            layer.update = update
        if affine is not None:
            saved_modes.train_affine(layer, affine, before)
    return memories


def _check(verb: str, name: str, layer: nn.Module, source: str | None, update: str | None) -> None:
    made = class_with_modes(layer)
    if isinstance(made, str):
        raise InputError(
            f"{verb}: layer {name!r} is a {type(layer).__name__}, which has no modes: it {made}; "
            "expected BatchNorm1d, 2d or 3d of torch.nn or of batchnorm. Nothing was changed"
        )
    if layer.running_mean is None and (source == "running" or update == "always"):
        asked = "source='running'" if source == "running" else "update='always'"
        raise InputError(
            f"{verb}: got {asked}, but layer {name!r} keeps no running statistics (track_running_stats=False). "
            "Nothing was changed"
        )
