"""The moments of what every batch-norm layer of a network receives, over batches; the network is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.batch import Batch
from batchnorm.errors import InputError
from batchnorm.functional import moments
from batchnorm.moments import Moments
from batchnorm.nn import modes, saved_modes
from batchnorm.nn.batch_norm import BatchNorm as Ours
from batchnorm.nn.modes import OURS
from batchnorm.nn.step_batch_norm import StepBatchNorm
from batchnorm.ops.fusion import Fusion
from batchnorm.pools import Pool
from batchnorm.running import Population
from batchnorm.sources import Given, OfBatch
from batchnorm.undo import Attributes, Memory

Method = Literal["pooled", "ioffe", "sequential"]

# Measured statistics are merged, and checked, once in so many runs of a layer.
_RUNS = 64


def keeps_biased(layer: _BatchNorm) -> bool:
    return isinstance(layer, Ours) and layer.running_var_kind == "biased"


def buffers_of(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The running statistics that are measured, which of domains are the current one's."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    domain = domain_of(layer)
    return (mean, var) if domain is None else (mean[domain], var[domain])


def domain_of(layer: _BatchNorm) -> int | None:
    return layer.domain if isinstance(layer, Ours) and layer.domains else None


def _takes_source(layer: _BatchNorm) -> bool:
    """Whether the layer's forward is this package's, or torch's plain one, for which ours can stand in."""
    kind = type(layer)
    ours = isinstance(layer, Ours) and kind.forward in (Ours.forward, StepBatchNorm.forward)
    return "forward" not in layer.__dict__ and (ours or kind in OURS)


def _not_finite(verb: str, name: str, batch: int) -> InputError:
    return InputError(
        f"{verb}: the input of layer {name!r} has values that are not finite in "
        f"batch {batch} (counted from 0); the network is unchanged"
    )


def _is_by_batch(layer: _BatchNorm) -> bool:
    """Whether a batch normalizes by more than one mean a channel, which no buffer holds, or by that of a group."""
    return isinstance(layer, Ours) and bool(layer.pool == "frame" or layer.ghost_size or layer.channel_groups)


def is_by_step(layer: _BatchNorm) -> bool:
    """Whether the batches of each time step are counted apart."""
    return isinstance(layer, Ours) and layer.pool == "frame"


class _Runs:
    """What some runs of a layer have measured: their batches, the values of a channel, mean and variance.

    Copied into one tensor: small tensors kept between large ones that come and go would keep the allocator from using
    their memory again.
    """

    def __init__(self, mean: Tensor) -> None:
        self.batches: list[int] = []
        self.values: list[int] = []
        self._statistics = mean.new_empty((_RUNS, 2, *mean.shape))

    def add(self, batch: int, values: int, mean: Tensor, var: Tensor) -> bool:
        """Whether there is no room for another."""
        row = self._statistics[len(self.values)]
        row[0].copy_(mean)
        row[1].copy_(var)
        self.batches.append(batch)
        self.values.append(values)
        return len(self.values) == _RUNS

    def moments(self) -> Moments:
        """Of each run: (runs, C)."""
        means, variances = self._statistics[: len(self.values)].unbind(1)
        counts = torch.tensor(self.values, dtype=torch.float64, device=means.device)[:, None]
        return Moments(counts, means, variances * counts)

    def first_not_finite(self) -> int | None:
        """The first batch with a value that is not finite."""
        finite = torch.isfinite(self._statistics[: len(self.values)]).flatten(1).all(1).tolist()
        return self.batches[finite.index(False)] if False in finite else None


@dataclass
class Estimate:
    """What has been measured of one layer's input: all of it, and the sum within the batches."""

    pooled: Moments
    m2_within: Tensor
    degrees_within: Tensor
    uses: int | Tensor = 1  # by step where the statistics are

    @classmethod
    def of(cls, batch: Moments) -> Estimate:
        uses = (batch.count > 1).long() if batch.mean.ndim == 2 else int(batch.count.max() > 0)
        return cls(batch, batch.m2, (batch.count - 1).clamp(min=0), uses)

    @classmethod
    def of_runs(cls, runs: _Runs) -> Estimate:
        """All of them at once."""
        each = runs.moments()
        return cls(each.merge_axis(0), each.m2.sum(0), (each.count - 1).sum(), len(runs.values))

    @classmethod
    def empty(cls, like: Tensor) -> Estimate:
        none = Moments.empty(tuple(like.shape), device=like.device)
        return cls(none, none.m2, none.count, 0)

    def all_reduce(self, group: dist.ProcessGroup | None) -> Estimate:
        """That of all ranks; the same bits on each."""
        degrees = self.degrees_within.expand_as(self.m2_within)
        uses = torch.zeros_like(self.m2_within) + self.uses
        sums = torch.stack([self.m2_within, degrees, uses])
        dist.all_reduce(sums, group=group)
        total = int(sums[2].flatten()[0]) if sums[2].ndim == 1 else sums[2][:, :1].long()
        return Estimate(self.pooled.all_reduce(group), sums[0], sums[1], total)

    def merge(self, new: Estimate) -> Estimate:
        return Estimate(
            self.pooled + new.pooled,
            self.m2_within + new.m2_within,
            self.degrees_within + new.degrees_within,
            self.uses + new.uses,
        )

    def statistics(self, name: str, method: Method, biased: bool = False) -> tuple[Tensor, Tensor]:
        """(mean, unbiased variance, or the biased one where asked for), both float64.

        Pooled: M2/(n - 1) of all values. Ioffe: sum M2_B / sum (m_B - 1) (Algorithm 2, line 10).
        """
        degrees = self.degrees_within if method == "ioffe" else self.pooled.count - 1
        if (degrees <= 0).all():
            uses = int(torch.as_tensor(self.uses).max())
            raise InputError(
                f"layer {name!r} got {int(self.pooled.count.max())} value(s) per channel in "
                f"{uses} batch(es), too few for a variance with method={method!r}; give more "
                "samples" + (" or larger batches" if method == "ioffe" else "")
            )
        m2 = self.m2_within if method == "ioffe" else self.pooled.m2
        var = m2 / degrees.clamp(min=1)
        return self.pooled.mean, var * (1 - 1 / self.pooled.count.clamp(min=1)) if biased else var


class _Measuring:
    """Normalizes by the batch's statistics, and tells them to a `Measurement`."""

    def __init__(self, measurement: Measurement, name: str, layer: Ours) -> None:
        self._measurement, self._name, self._layer = measurement, name, layer

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, None]:
        y, measured = OfBatch().normalize(batch, pool, fusion)
        number = measured.number
        if number is not None and number > 1 and not (pool.size or pool.groups):
            self._measurement.add_run(self._name, number, measured.mean, measured.var)
        else:
            self._measurement.add(self._name, self._layer._moments(batch))
        return y, None


class _Fixed(NamedTuple):
    """Normalizes by statistics that are final."""

    population: Population

    def normalize(self, batch: Batch, pool: Pool, fusion: Fusion) -> tuple[Tensor, None]:
        return Given(*self.population.read(batch.steps, batch.first)).normalize(batch, pool, fusion)


class Measurement:
    """A network in evaluation mode whose batch-norm layers are measured; all undone on leaving.

    This package's layers, and torch's, which become ours for the time, get a source of statistics that normalizes by
    the batch and measures it. Other classes read their buffers in evaluation mode. So before each call these are
    replaced by the statistics of that very input: it is then normalized as in training, without an update, by
    any kind of layer (also SyncBatchNorm on a CPU), and for a single value per channel, too.
    """

    def __init__(self, net: nn.Module, layers: dict[str, _BatchNorm], verb: str = "calibrate") -> None:
        self._layers = layers
        self._verb = verb
        self._net = net
        self._buffers = {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}
        self._memories: list[Memory] = [
            Attributes(net.modules(), "training"),
            Attributes(layers.values(), "running_mean", "running_var"),
        ]
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._estimates: dict[str, Estimate] = {}
        self._runs: dict[str, _Runs] = {}  # what is not in the estimates yet
        self._reached: dict[str, int] = {}  # in which place each layer first ran
        self._batch = 0

    def __enter__(self) -> Measurement:
        try:
            for module in self._net.modules():
                module.training = False
            for name, layer in self._layers.items():
                if isinstance(layer, Ours) or _takes_source(layer):
                    memory = modes.adopt(layer, saved_modes.flags(layer))
                    assert isinstance(layer, Ours)
                    self._memories.append(modes.Before(layer, memory))
                if _takes_source(layer) and isinstance(layer, Ours):
                    self._memories.append(Attributes([layer], "_source"))
                    layer._source = _Measuring(self, name, layer)
                    continue
                if isinstance(layer, Ours):  # the buffers alone are to normalize, where they can
                    layer.source, layer.update = "batch" if _is_by_batch(layer) else "running", "never"
                self._hooks[name] = layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def over(
        self, batches: Iterable[Any], run: Callable[[Any], Any], may_be_empty: bool = False
    ) -> dict[str, Estimate]:
        """What one pass measures, by layer, in the order in which the layers first ran."""
        self._estimates, self._runs, self._reached, self._batch = {}, {}, {}, 0
        for batch in batches:
            run(batch)
            self._batch += 1
        self._merge_runs()
        if not self._batch and not may_be_empty:
            raise InputError(f"{self._verb}: got no batches; expected at least one")
        return {name: self._estimates[name] for name in self._reached}

    def finish(self, name: str, mean: Tensor, var: Tensor) -> None:
        """Measure this layer no longer: it normalizes by these statistics from now on."""
        layer = self._layers[name]
        if name in self._hooks:
            self._hooks.pop(name).remove()
            self._set_buffers(name, mean, var)
            return
        assert isinstance(layer, Ours)
        like_mean, like_var = buffers_of(layer)
        uses = torch.as_tensor(self._estimates[name].uses).flatten() if is_by_step(layer) else None
        layer._source = _Fixed(Population(mean.to(like_mean), var.to(like_var), batches=uses))

    def finish_all(self, measured: dict[str, Estimate]) -> None:
        """`finish` with what earlier passes have measured, for a pass in another process."""
        self._estimates = dict(measured)
        for name, estimate in measured.items():
            self.finish(name, *estimate.statistics(name, "sequential", self.keeps_biased(name)))

    def keeps_biased(self, name: str) -> bool:
        return keeps_biased(self._layers[name])

    def _hook(self, name: str) -> Callable[..., None]:
        def measure(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if isinstance(layer, Ours):
                batch = layer.input_moments(*args, **kwargs)
            else:
                batch = moments(args[0] if args else next(iter(kwargs.values())))
            self.add(name, batch)
            if not (isinstance(layer, Ours) and _is_by_batch(layer)):
                self._set_buffers(name, batch.mean, batch.variance(unbiased=False))

        return measure

    def add(self, name: str, batch: Moments) -> None:
        """Takes in the moments of one run of a layer."""
        if not (torch.isfinite(batch.mean) & torch.isfinite(batch.m2)).all():
            self._merge_runs()  # a layer before this one may have met the value first
            raise _not_finite(self._verb, name, self._batch)
        self._take(name, Estimate.of(batch))

    def add_run(self, name: str, values: int, mean: Tensor, var: Tensor) -> None:
        """The same of statistics (1, C) of so many values; they are merged later."""
        self._reach(name)
        runs = self._runs.get(name) or self._runs.setdefault(name, _Runs(mean[0]))
        if runs.add(self._batch, values, mean[0], var[0]):
            self._merge_runs()

    def _reach(self, name: str) -> None:
        self._reached.setdefault(name, len(self._reached))

    def _take(self, name: str, new: Estimate) -> None:
        self._reach(name)
        before = self._estimates.get(name)
        self._estimates[name] = before.merge(new) if before else new

    def _merge_runs(self) -> None:
        """Takes in what has been measured since the last time; raises for the first value that is not finite."""
        first = {name: batch for name, runs in self._runs.items() if (batch := runs.first_not_finite()) is not None}
        if first:
            name = min(first, key=lambda name: (first[name], self._reached[name]))
            raise _not_finite(self._verb, name, first[name])
        new = {name: Estimate.of_runs(runs) for name, runs in self._runs.items()}
        for name, estimate in new.items():
            self._take(name, estimate)
        self._runs = {}

    def _set_buffers(self, name: str, mean: Tensor, var: Tensor) -> None:
        layer = self._layers[name]
        old_mean, old_var = self._buffers[name]
        assert old_mean is not None
        assert old_var is not None
        if (domain := domain_of(layer)) is not None:
            mean, var = (t.to(old).expand_as(old[domain]) for t, old in ((mean, old_mean), (var, old_var)))
            mean, var = (torch.stack([t] * len(old_mean)) for t in (mean, var))
        layer.running_mean, layer.running_var = mean.to(old_mean), var.to(old_var)

    def _restore(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        for memory in reversed(self._memories):
            memory.restore()
