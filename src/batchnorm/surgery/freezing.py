"""Freezing: batch normalization as a fixed affine map, whatever mode the network is in."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import SurgeryError, by_reason
from batchnorm.nn import batch_norm as ours
from batchnorm.nn import modes
from batchnorm.nn.saved_modes import FROZEN, flags, train_affine
from batchnorm.surgery.frozen import told_of_frozen
from batchnorm.surgery.modules import unwrap
from batchnorm.surgery.plan import Plan, Step


def freeze(net: nn.Module) -> nn.Module:
    """Freeze every batch normalization of ``net``, in place, until ``unfreeze``.

    A frozen layer normalizes with its running statistics (``source="running"``), never updates
    them (``update="never"``), and its gamma and beta take no gradient (the modes of `set_mode`). It
    stays so through ``.train()``, ``.to()``, ``deepcopy``, pickling and loading of a ``state_dict``;
    a ``state_dict`` tells, in its metadata, that it is frozen, and freezes the layers that load it.
    Layers of torch.nn become this package's for the time: the same objects with the same
    parameters, buffers, hooks and ``state_dict`` keys. So do layers of other people's subclasses and
    of ``SyncBatchNorm``, which keep their own ``forward``, with an activation in it, say. Gradients
    that gamma and beta hold are dropped, so that no optimizer moves them. Freezing twice is freezing
    once. Freeze before wrapping in DistributedDataParallel, which counts on the gradients that it
    has seen.

    Args:
        net: the network; it is changed and returned. The ``training`` flags stay as they are.

    Returns:
        The network.

    Warns:
        UserWarning: modules of classes that are not torch's keep running statistics of their own, and go on doing so.

    Raises:
        InputError: when ``net`` is no module.
        SurgeryError: when a layer keeps no running statistics, or is of a class whose forward does not
            follow its modes, as a trial run on copies shows; nothing is then changed.

    Source: Ren et al. 2015, Faster R-CNN, and He et al. 2017, Mask R-CNN, which train with batch normalization fixed.

    Examples:
        >>> net = freeze(nn.Sequential(nn.BatchNorm1d(2)))
        >>> net[0].source, net[0].weight.requires_grad
        ('running', False)
    """
    root = unwrap(net, "freeze")
    layers = {n: m for n, m in root.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        raise SurgeryError("freeze: the network has no batch normalization" + told_of_frozen(root))
    thawed = {name: layer for name, layer in layers.items() if not is_frozen(layer)}
    obstacles = {name: reason for name, m in thawed.items() if (reason := _obstacle(m))}
    if obstacles:
        raise SurgeryError(f"freeze: {by_reason(obstacles)}. Nothing was changed.")
    before = {name: flags(layer) for name, layer in thawed.items()}  # layers may share a gamma
    steps = [Step(f"{n}: frozen", _freezing(layer, before[n])) for n, layer in thawed.items()]

    def verify() -> None:
        for name, layer in layers.items():
            assert isinstance(layer, ours.BatchNorm)
            if layer.normalizes_by_batch or layer.updates_statistics:
                raise SurgeryError(f"freeze: '{name}' has been set free; unfreeze(net) first")

    modes.warn_of_strangers(root, "freeze")
    Plan(root, steps, verify).apply()
    return net


def unfreeze(net: nn.Module) -> nn.Module:
    """Undo ``freeze``: class, source, update and ``requires_grad`` as they were, in place.

    Running statistics, gamma, beta and the ``training`` flags keep the values that they have.
    Layers that are not frozen are left alone.

    Args:
        net: the network; it is changed and returned.

    Returns:
        The network.

    Raises:
        InputError: when ``net`` is no module.

    Source: this package.

    Examples:
        >>> net = unfreeze(freeze(nn.Sequential(nn.BatchNorm1d(2))))
        >>> type(net[0]) is nn.BatchNorm1d, net[0].weight.requires_grad
        (True, True)
    """
    root = unwrap(net, "unfreeze")
    frozen = {name: module for name, module in root.named_modules() if is_frozen(module)}
    steps = [Step(f"{name}: unfrozen", _thawing(layer)) for name, layer in frozen.items()]
    Plan(root, steps, lambda: None).apply()
    return net


def is_frozen(module: nn.Module) -> bool:
    """Whether ``freeze`` holds this layer."""
    return FROZEN in module.__dict__


def _obstacle(layer: _BatchNorm) -> str | None:
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics to freeze (track_running_stats=False)"
    made = modes.class_with_modes(layer)
    if isinstance(made, str):
        return f"is a {type(layer).__qualname__}, which may do more than torch.nn.BatchNorm*d: it {made}"
    return None


def _freezing(layer: _BatchNorm, requires_grad: dict[str, bool]) -> Callable[[], None]:
    def do() -> None:
        memory = modes.adopt(layer, requires_grad)
        assert isinstance(layer, ours.BatchNorm)
        layer.__dict__[FROZEN] = memory
        layer.source, layer.update = "running", "never"
        train_affine(layer, False, requires_grad)

    return do


def _thawing(layer: nn.Module) -> Callable[[], None]:
    def do() -> None:
        modes.restore(layer, layer.__dict__.pop(FROZEN))

    return do
