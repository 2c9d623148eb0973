"""Gradient accumulation that is exactly the large batch: statistics and gradients pooled over micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.batch import Batch, is_plain
from batchnorm.errors import InputError
from batchnorm.functional import moments
from batchnorm.moments import Moments
from batchnorm.nn import modes, options
from batchnorm.ops.fusion import Fusion
from batchnorm.pools import Pool
from batchnorm.sources import Given
from batchnorm.undo import Attributes, kept

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

    Source: this package: the fixed point of the statistics and of the multipliers (Ioffe & Szegedy 2015, section 3,
    gives the gradient through the statistics of one batch).

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
        >>> data = torch.randn(8, 1)
        >>> total = accumulate_exact(net, data.split(4), lambda net, x: net(x).square().sum() / 8)
        >>> torch.allclose(total, net(data).square().mean())
        True
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
                    layers[name]._population().mix(pooled.count.reshape(1, 1), mean, var)
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
        parts = next((option.name for option in options.changed(layer) if option.parts), None)
        if parts is not None:
            raise InputError(f"accumulate_exact: layer {name!r} has {parts}=; it is for channels as the only pools")
    return layers


class _OfAll:
    """A source: the statistics of all micro-batches, through which the gradient runs."""

    def __init__(self, passes: _Passes, name: str) -> None:
        self.passes, self.name = passes, name

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, None]:
        """y; x is standardized first, then by the mean 0 and the variance 1 - eps."""
        x, restored = batch.x, batch.restore is not Batch(batch.x).restore
        if not is_plain(batch) or restored:
            raise InputError(
                f"accumulate_exact: layer {self.name!r} is given masked, weighted or packed values, which are not "
                "merged exactly; bn.accumulate merges their statistics"
            )
        mean, var = (_along(s, x) for s in self.passes.statistics_of(self.name, x))
        dtype = torch.promote_types(x.dtype, torch.float32)
        standardized = ((x.to(dtype) - mean.to(dtype)) * torch.rsqrt(var + fusion.eps).to(dtype)).to(x.dtype)
        like = x.new_zeros(x.shape[1], dtype=dtype if fusion.weight is None else fusion.weight.dtype)
        rest = Given(like, torch.full_like(like, 1 - fusion.eps))
        return rest.normalize(batch._replace(x=standardized), pool, fusion)


class _Passes:
    """Passes over all micro-batches in which the layers normalize by given statistics."""

    def __init__(
        self, net: nn.Module, layers: dict[str, Any], batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]
    ) -> None:
        self.net, self.layers, self.batches, self.loss = net, layers, batches, loss
        self.given: dict[Use, _Point] = {}
        self.received: list[tuple[Use, Tensor]] = []

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """The layers normalize by the given statistics."""
        with kept(Attributes(self.layers.values(), "_source")):
            for name, layer in self.layers.items():
                layer._source = _OfAll(self, name)
            yield

    def statistics_of(self, name: str, x: Tensor) -> _Point:
        """The statistics for the next use of a layer in this forward, which receives x."""
        use = (name, sum(earlier == name for (earlier, _), _ in self.received))
        self.received.append((use, x))
        if use not in self.given:  # the first pass: any statistics will do
            batch = moments(x)
            self.given[use] = _Point(batch.mean, batch.variance(unbiased=False))
        return self.given[use]

    def _each(self) -> Iterator[Tensor]:
        """The loss of every micro-batch, under the same random numbers in each pass."""
        state = torch.get_rng_state()
        for batch in self.batches:
            self.received = []
            yield self.loss(self.net, batch)
        self.after = torch.get_rng_state()
        torch.set_rng_state(state)

    @torch.no_grad()
    def measure(self) -> dict[Use, Moments]:
        """Statistics s = S(s) of all micro-batches."""
        while True:
            pooled: dict[Use, Moments] = {}
            for _ in self._each():
                for use, x in self.received:
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
        for use, x in self.received:
            n, mean, (l_mean, l_var) = statistics[use].count, _along(self.given[use].mean, x), by_use[use]
            wide = x.to(mean.dtype)
            gain = _along(l_mean, x) * (wide - mean.detach()) + _along(l_var, x) * (wide - mean).square()
            loss = loss + (gain.sum() / n).to(loss.dtype)
        return loss


def _along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))
