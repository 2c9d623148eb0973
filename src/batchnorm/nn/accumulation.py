"""Gradient accumulation that is exactly the large batch: statistics and gradients pooled over micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.functional import moments
from batchnorm.moments import Moments
from batchnorm.nn import modes, running_statistics

Use = tuple[str, int]  # a layer, and how often it ran before in this forward


class _Point(NamedTuple):
    """The statistics of one use, as leaves of the graph, and what the loss gains by a unit of each."""

    mean: Tensor
    var: Tensor


def accumulate_exact(net: nn.Module, micro_batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """Gradients of ``sum(loss(net, b) for b in micro_batches)`` as if all micro-batches had gone through as one batch.

    Every layer normalizes by the mean and *biased* variance of all micro-batches together, and the gradient runs
    through these statistics. They solve ``s = S(theta, s)``, in which a layer's statistics depend on those of the
    layers before it; the multipliers of the gradient, ``l = dL/ds + l dS/ds``, depend on those of the layers after it.
    Both are iterated until nothing changes, which an n-layer network reaches after n passes at most. So one
    normalization costs two passes to measure, and one to derive, before the pass that fills the gradients; memory is
    that of one micro-batch throughout.

    Args:
        net: the network; its layers that normalize by batch statistics take part, the others are left alone.
        micro_batches: they are read several times. Random numbers are the same in each pass.
        loss: of one micro-batch, a scalar. Divide by the *total* number of samples for the mean over all.

    Returns:
        The total loss, detached. Gradients are added to ``.grad``, and the running statistics updated once for every
        use of a layer, as by the large batch.

    Raises:
        InputError: no micro-batch, no layer that takes part, one with batch renormalization or other pools than its
            channels, or one that is given masked or packed values.
    """
    micro_batches = list(micro_batches)
    if not micro_batches:
        raise InputError("accumulate_exact: got no micro-batches; expected at least one")
    with modes.mode(net):  # torch's layers become ours for the time
        layers = _participants(net)
        updating = [name for name, layer in layers.items() if layer.updates_statistics]
        passes = _Passes(net, layers, micro_batches, loss)
        with passes.prepared():
            statistics = passes.measure()
            total = passes.differentiate(statistics)
        with torch.no_grad():
            for (name, _), pooled in statistics.items():
                if name in updating:
                    mean, var = pooled.mean[None], pooled.variance(unbiased=False)[None]
                    running_statistics.update(layers[name], mean, var, pooled.count.reshape(1, 1))
    return total


def _participants(net: nn.Module) -> dict[str, Any]:
    layers: dict[str, Any] = {
        name: m
        for name, m in net.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.normalizes_by_batch
    }
    if not layers:
        raise InputError("accumulate_exact: no layer normalizes by batch statistics; call net.train() first")
    for name, layer in layers.items():
        if layer.renorm is not None:
            raise InputError(f"accumulate_exact: layer {name!r} has renorm=, whose r and d belong to a batch")
        pooled = [k for k in ("pool", "ghost_size", "channel_groups", "process_group", "domains") if getattr(layer, k)]
        if pooled:
            raise InputError(f"accumulate_exact: layer {name!r} has {pooled[0]}=; it is for channels as the only pools")
    return layers


class _Passes:
    """Passes over all micro-batches in which the layers normalize by given statistics."""

    def __init__(
        self, net: nn.Module, layers: dict[str, Any], batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]
    ) -> None:
        self.net, self.layers, self.batches, self.loss = net, layers, batches, loss
        self.given: dict[Use, _Point] = {}
        self.seen: list[tuple[Use, Tensor]] = []

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """The layers themselves only apply gamma, beta and activation: their variance is 1 - eps."""
        hooks, buffers = [], {name: (m.running_mean, m.running_var) for name, m in self.layers.items()}
        memory = [(m, m.source, m.update, m.example_weight) for m in self.layers.values()]
        try:
            for name, layer in self.layers.items():
                like = next(iter(layer.parameters(recurse=False)), layer.running_mean)
                like = torch.empty(layer.num_features) if like is None else like.detach()
                layer.running_mean = torch.zeros_like(like)
                layer.running_var = torch.full_like(like, 1 - layer.eps)
                layer.source, layer.update, layer.example_weight = "running", "never", 0.0
                hooks.append(layer.register_forward_pre_hook(self._standardize(name), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, layer in self.layers.items():
                layer.running_mean, layer.running_var = buffers[name]
            for layer, source, update, example_weight in memory:
                layer.source, layer.update, layer.example_weight = source, update, example_weight

    def _standardize(self, name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = dict(kwargs)
            x, *rest = args or (kwargs.pop("input"),)
            masked = len(rest) > 1 or any(kwargs.get(k) is not None for k in ("mask", "lengths", "weights"))
            if masked or not isinstance(x, Tensor) or x.is_nested:
                raise InputError(
                    f"accumulate_exact: layer {name!r} is given masked, weighted or packed values, which are not "
                    "merged exactly; bn.accumulate merges their statistics"
                )
            use = (name, sum(earlier == name for (earlier, _), _ in self.seen))
            self.seen.append((use, x))
            if use not in self.given:  # the first pass: any statistics will do
                batch = moments(x)
                self.given[use] = _Point(batch.mean, batch.variance(unbiased=False))
            mean, var = (_along(s, x) for s in self.given[use])
            dtype = torch.promote_types(x.dtype, torch.float32)
            standardized = ((x.to(dtype) - mean.to(dtype)) * torch.rsqrt(var + layer.eps).to(dtype)).to(x.dtype)
            return (standardized, *rest), kwargs

        return hook

    def _each(self) -> Iterator[Tensor]:
        """The loss of every micro-batch, under the same random numbers in each pass."""
        state = torch.get_rng_state()
        for batch in self.batches:
            self.seen = []
            yield self.loss(self.net, batch)
        self.after = torch.get_rng_state()
        torch.set_rng_state(state)

    @torch.no_grad()
    def measure(self) -> dict[Use, Moments]:
        """Statistics s = S(s) of all micro-batches."""
        while True:
            pooled: dict[Use, Moments] = {}
            for _ in self._each():
                for use, x in self.seen:
                    pooled[use] = pooled[use] + moments(x) if use in pooled else moments(x)
            new = {use: _Point(m.mean, m.variance(unbiased=False)) for use, m in pooled.items()}
            if all(torch.equal(a, b) for use in new for a, b in zip(new[use], self.given[use], strict=True)):
                return pooled
            if not all(torch.isfinite(value).all() for point in new.values() for value in point):
                raise InputError("accumulate_exact: an input of a layer is not finite; nothing was changed")
            self.given = new

    def differentiate(self, statistics: dict[Use, Moments]) -> Tensor:
        """Multipliers l = dL/ds + l dS/ds, and with them the gradients of the parameters."""
        self.given = {use: _Point(*(s.clone().requires_grad_() for s in point)) for use, point in self.given.items()}
        leaves = [s for point in self.given.values() for s in point]
        multipliers = [torch.zeros_like(s) for s in leaves]
        while True:
            new = [torch.zeros_like(s) for s in leaves]
            for loss in self._each():
                gain = self._lagrangian(loss, multipliers, statistics)
                for total, part in zip(new, torch.autograd.grad(gain, leaves, allow_unused=True), strict=True):
                    total += 0 if part is None else part
            if all(torch.equal(a, b) for a, b in zip(new, multipliers, strict=True)):
                break
            multipliers = new
        for leaf in leaves:
            leaf.requires_grad_(False)
        sum_of_losses = torch.zeros(())
        for loss in self._each():
            self._lagrangian(loss, multipliers, statistics).backward()
            sum_of_losses = sum_of_losses.to(loss.device) + loss.detach()
        torch.set_rng_state(self.after)
        return sum_of_losses

    def _lagrangian(self, loss: Tensor, multipliers: list[Tensor], statistics: dict[Use, Moments]) -> Tensor:
        """The loss of a micro-batch and its share of l S: of the mean sum x/n, of the variance sum (x - mean)^2/n."""
        by_use = dict(zip(self.given, zip(multipliers[::2], multipliers[1::2], strict=True), strict=True))
        for use, x in self.seen:
            n, mean, (l_mean, l_var) = statistics[use].count, _along(self.given[use].mean, x), by_use[use]
            wide = x.to(mean.dtype)
            gain = _along(l_mean, x) * (wide - mean.detach()) + _along(l_var, x) * (wide - mean).square()
            loss = loss + (gain.sum() / n).to(loss.dtype)
        return loss


def _along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))
