"""Adaptation of a trained network to shifted data, by its batch normalization alone, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError
from batchnorm.nn import modes
from batchnorm.population.calibration import calibrate
from batchnorm.population.feeding import Lengths, feed, sample_count, with_lengths
from batchnorm.undo import Attributes, Flags, Values, kept

Method = Literal["statistics", "tent"]
Net = TypeVar("Net", bound=nn.Module)

_SOURCE = "_before_adapting"


def adapt(
    net: Net,
    batches: Iterable[Any],
    *,
    prior: float = 16,
    method: Method = "statistics",
    learning_rate: float = 1e-3,
    forward: Callable[[Net, Any], Any] | None = None,
    lengths: Lengths | None = None,
) -> Net:
    """Adapt the batch normalizations of a trained network to new data without labels, in place.

    `"statistics"`: mean and variance become ``N/(N + n) source + n/(N + n) target``, where N is the prior, n the
    number of samples in ``batches``, and the target is measured on them as `calibrate` does. `"tent"`: before that,
    gamma and beta take one step of Adam a batch down the mean entropy of the network's predictions, each batch
    normalized by its own statistics, everything else fixed.

    The source is what the network was before the first ``adapt``: adapting twice is adapting once, to the second data.
    `restore` brings it back.

    Args:
        net: the network, which returns logits (..., classes) for `"tent"`.
        batches: as for `calibrate`; a tensor is one batch. `"tent"` reads them twice, so no one-shot iterator.
        prior: N, in samples; 0 takes the new data alone, `math.inf` changes nothing.
        method: `"statistics"` (Schneider et al. 2020) or `"tent"` (Wang et al. 2021).
        learning_rate: of Adam, for `"tent"`.
        forward: ``forward(net, batch)``; by default a tuple feeds its first element, a dict what ``net.forward`` takes.
        lengths: where a batch has the valid lengths of its sequences, as for `calibrate`.

    Returns:
        The network. ``running_var`` stays of the kind that the layers keep (the target is measured *unbiased*).

    Raises:
        InputError: a negative prior, an unknown method, no layer or batch, an entropy that is not finite. On this and
            any other error the network is left as it was.

    Source: Schneider et al. 2020, Improving robustness against common corruptions by covariate shift adaptation;
    Wang et al. 2021, Tent: Fully Test-Time Adaptation by Entropy Minimization.

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> adapt(net, torch.tensor([[1.0], [3.0]]), prior=2)[0].running_mean
        tensor([1.])
        >>> restore(net)[0].running_mean
        tensor([0.])
    """
    if method not in get_args(Method):
        raise InputError(f"adapt: got method={method!r}; expected one of {get_args(Method)}")
    if not prior >= 0:
        raise InputError(f"adapt: got prior={prior}; expected a number of samples, 0 or more")
    if isinstance(batches, Tensor):
        batches = [batches]
    if method == "tent" and iter(batches) is batches:
        raise InputError(f"adapt: got a one-shot {type(batches).__name__} for method='tent'; expected a list")
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    run = with_lengths(forward or feed, lengths)
    tensors = [t for layer in layers for t in _contents(layer).values()]
    with kept(Values(tensors), Attributes(layers, _SOURCE), if_it_fails=True):
        for layer in layers:
            layer.__dict__.setdefault(_SOURCE, {name: value.clone() for name, value in _contents(layer).items()})
            _put(layer, layer.__dict__[_SOURCE])
        if method == "tent":
            _tent(net, batches, learning_rate, run)
        seen = _Counted(batches)
        calibrate(net, seen, forward=run)
        share = 0.0 if math.isinf(prior) else seen.samples / (prior + seen.samples)
        for layer in layers:
            _mix(layer, layer.__dict__[_SOURCE], share)
    return net


def restore(net: Net) -> Net:
    """Undo `adapt`: statistics, gamma and beta as they were before the first one. Others stay as they are.

    Args:
        net: the network; it is changed and returned.

    Returns:
        The network.

    Raises:
        InputError: when ``net`` is no module.

    Source: this package.

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> restore(adapt(net, torch.tensor([[1.0], [3.0]])))[0].running_mean
        tensor([0.])
    """
    if not isinstance(net, nn.Module):
        raise InputError(f"restore: expected a torch.nn.Module, got {type(net).__name__}")
    for layer in net.modules():
        if _SOURCE in layer.__dict__:
            _put(layer, layer.__dict__.pop(_SOURCE))
    return net


def _contents(layer: nn.Module) -> dict[str, Tensor]:
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return {name: value.detach() for name, value in tensors}


@torch.no_grad()
def _put(layer: nn.Module, contents: dict[str, Tensor]) -> None:
    for name, value in contents.items():
        getattr(layer, name).copy_(value)


@torch.no_grad()
def _mix(layer: _BatchNorm, source: dict[str, Tensor], share: float) -> None:
    for name in ("running_mean", "running_var"):
        buffer = getattr(layer, name)
        buffer.copy_((1 - share) * source[name].to(buffer).double() + share * buffer.double())
    if layer.num_batches_tracked is not None:  # which counts the batches of training
        layer.num_batches_tracked.copy_(source["num_batches_tracked"])


class _Counted:
    """The batches, and how many samples they held."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.samples = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.samples += sample_count(batch)
            yield batch


def _tent(net: nn.Module, batches: Iterable[Any], learning_rate: float, forward: Callable[[Any, Any], Any]) -> None:
    """One step of Adam a batch on gamma and beta; flags, modes and gradients are restored."""
    affine = {id(p): p for m in net.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    if not affine:
        raise InputError("adapt: no batch normalization has gamma or beta for method='tent' to train")
    memories = Attributes(net.modules(), "training"), Flags(net.parameters())
    with kept(*memories), modes.mode(net, source="batch", update="never"), torch.enable_grad():
        net.eval()
        for p in net.parameters():
            p.grad = None
            p.requires_grad_(id(p) in affine)
        optimizer = torch.optim.Adam(affine.values(), lr=learning_rate)
        for i, batch in enumerate(batches):
            logits = forward(net, batch)
            log_p = logits.log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
            if not torch.isfinite(entropy):
                raise InputError(f"adapt: the entropy of batch {i} (counted from 0) is not finite")
            optimizer.zero_grad()
            entropy.backward()
            optimizer.step()
