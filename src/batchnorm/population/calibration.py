"""Exact population statistics for every batch-norm layer of a network, by a pass over data."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm import functional
from batchnorm.errors import InputError
from batchnorm.functional import moments
from batchnorm.moments import Moments
from batchnorm.nn.batch_norm import _BatchNorm as Ours
from batchnorm.nn.modes import OURS
from batchnorm.views import is_traced

Method = Literal["pooled", "ioffe", "sequential"]
Net = TypeVar("Net", bound=nn.Module)


def calibrate(
    net: Net,
    batches: Iterable[Any],
    *,
    method: Method = "pooled",
    forward: Callable[[Net, Any], Any] | None = None,
    samples: int | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | Literal["world"] | None = None,
) -> Net:
    """Replace the running statistics of every batch-norm layer by exact ones, measured on data.

    The network is run over the batches without gradients. All of it is in evaluation mode (no
    dropout), but each batch-norm layer normalizes by the statistics of its batch, as in training,
    while the moments (n, mean, M2) of its input are measured in float64. From these:

    - `"pooled"`: all batches of a layer are merged into one pool, whatever their sizes. The
      variance *between* batches is in it: the statistics of the concatenated inputs.
    - `"ioffe"`: E = mean of mu_B, Var = m/(m-1) mean of v_B, the variance *within* batches alone.
      Unequal batches count with their m: Var = sum M2_B / sum (m_B - 1).
    - `"sequential"`: as pooled, but each layer's input is measured under the final statistics of
      the layers that run before it, so the statistics are those of inference. One pass a layer.

    `running_var` gets the *unbiased* variance, as torch keeps it (the *biased* one in layers with
    `running_var="biased"`), and `num_batches_tracked` the
    number of batches that a layer was measured on. A layer that runs several times in a forward
    pass pools all its uses, each normalized by its own statistics (and counted as a batch). A
    batch of one value per channel counts too; the layer's output is then its bias, as x = mean.
    Masked, packed and weighted inputs count with their valid values; statistics by time step are
    measured by step; of domains the current one's are replaced. Layers of torch.nn or ours measure
    and normalize in one reading of their input, so that the passes cost no more than forward passes
    in training.

    Arguments:
        net: any network with batch-norm layers (torch's, SyncBatchNorm included, or ours).
        batches: an iterable of what the network takes; a tensor is one batch. `"sequential"` needs
            one that can be read again, such as a list or a DataLoader.
        forward: called as `forward(net, batch)` to run the network on a batch. By default a tuple
            or list feeds its first element, a dict the entries that `net.forward` has names for
            (so labels are ignored), and tensors are moved to the network's device.
        samples: stop at the first batch with which this many samples have been seen, in each
            pass; by default all batches are read. A batch's samples are the length of its first
            tensor.
        progress: show a progress bar on standard error.
        process_group: `"world"` or a group of torch.distributed, every rank of which calls this
            with its part of the data: all parts are merged, and every rank gets the same bits. A
            rank may have no data, and an error on one is an error on all. None: this process.

    Returns:
        The network, its statistics replaced and all else (modes, hooks, momentum) as it was.

    Raises:
        InputError: no batch-norm layer, no batch, a one-shot iterator for `"sequential"`, an input
            that is not finite (named by layer and batch), too few values for a variance. On this
            and any other error, Ctrl-C included, the network is left exactly as it was.

    Warns:
        UserWarning: layers without running statistics, or that no batch reached, are left alone.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 10; Chan, Golub & LeVeque 1983 (merging).

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> batches = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0]])]
    >>> calibrate(net, batches)[0].running_mean
    tensor([4.])
    """
    if method not in get_args(Method):
        raise InputError(f"calibrate: got method={method!r}; expected one of {get_args(Method)}")
    if samples is not None and samples < 1:
        raise InputError(f"calibrate: got samples={samples}; expected at least 1, or None for all")
    layers = _layers_with_statistics(net)
    if isinstance(batches, Tensor):
        batches = [batches]
    if isinstance(batches, Mapping):
        raise InputError("calibrate: got one dict for batches; expected an iterable, such as [dict]")
    if method == "sequential" and len(layers) > 1 and iter(batches) is batches:
        raise InputError(
            f"calibrate: got a one-shot {type(batches).__name__} for method='sequential', which "
            "reads the batches once a layer; expected a list, a DataLoader, or the like"
        )
    run = forward or _feed
    with (
        torch.no_grad(),
        _eager(),
        _progress_bar(progress, batches, samples) as advance,
        _Measurement(net, layers) as measurement,
    ):

        def measure() -> dict[str, _Estimate]:
            read = _read(batches, samples, advance)
            if process_group is None:
                return measurement.over(read, lambda batch: run(net, batch))
            return _over_ranks(
                lambda: measurement.over(read, lambda batch: run(net, batch), may_be_empty=True),
                layers,
                None if process_group == "world" else process_group,
            )

        estimates = _one_by_one(measurement, measure) if method == "sequential" else measure()
        new = {name: e.statistics(name, method, _keeps_biased(layers[name])) for name, e in estimates.items()}
    if not new:
        raise InputError("calibrate: the batches reached no batch-norm layer of the network")
    _warn("were not reached by the batches", [name for name in layers if name not in new])
    _commit([(layers[name], name, *new[name], estimates[name].uses) for name in new])
    return net


def _layers_with_statistics(net: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers that keep running statistics, by name; warns of those that do not."""
    if not isinstance(net, nn.Module):
        raise InputError(f"calibrate: got a {type(net).__name__}; expected a torch.nn.Module")
    found = {name: m for name, m in net.named_modules() if isinstance(m, _BatchNorm)}
    if not found:
        raise InputError(f"calibrate: {type(net).__name__} has no batch-norm layer; bn.insert puts them in")
    kept = {
        name: layer for name, layer in found.items() if layer.track_running_stats and layer.running_mean is not None
    }
    if not kept:
        raise InputError(
            f"calibrate: no batch-norm layer of {type(net).__name__} keeps running statistics "
            "(track_running_stats=False), so there is nothing to replace"
        )
    lazy = [name for name, layer in kept.items() if is_lazy(_buffers(layer)[0])]
    if lazy:
        raise InputError(f"calibrate: layers {lazy} are not initialized; run the network on a batch first")
    _warn("keep no running statistics", [name for name in found if name not in kept])
    return kept


# What is measured is merged, and checked, once in so many runs of a layer.
_RUNS = 64

# What a layer is not while it is measured.
_ALONE: dict[str, Any] = {"example_weight": 0.0, "process_group": None, "domains": 0}


def _keeps_biased(layer: _BatchNorm) -> bool:
    return isinstance(layer, Ours) and layer.running_var_kind == "biased"


def _buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The running statistics that are measured, which of domains are the current one's."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    domain = _domain(layer)
    return (mean, var) if domain is None else (mean[domain], var[domain])


def _domain(layer: _BatchNorm) -> int | None:
    return layer.domain if isinstance(layer, Ours) and layer.domains else None


def _is_plain(layer: _BatchNorm) -> bool:
    """Whether the layer is one of torch.nn's or ours, in which a channel is one pool, and has no forward of its own."""
    known = type(layer) in OURS or type(layer) in OURS.values()
    return known and "forward" not in layer.__dict__ and not getattr(layer, "_pooled", False)


def _not_finite(name: str, batch: int) -> InputError:
    return InputError(
        f"calibrate: the input of layer {name!r} has values that are not finite in "
        f"batch {batch} (counted from 0); the network is unchanged"
    )


def _is_by_batch(layer: _BatchNorm) -> bool:
    """Whether a batch normalizes by more than one mean a channel, which no buffer holds, or by that of a group."""
    return isinstance(layer, Ours) and bool(layer.pool == "frame" or layer.ghost_size or layer.channel_groups)


def _is_by_step(layer: _BatchNorm) -> bool:
    """Whether the batches of each time step are counted apart."""
    return isinstance(layer, Ours) and layer.pool == "frame"


def _warn(what: str, names: list[str]) -> None:
    if names:
        warnings.warn(f"calibrate: layers {names} {what} and are left alone", stacklevel=3)


# Reading batches


def _read(batches: Iterable[Any], samples: int | None, advance: Callable[[int], None]) -> Iterator[Any]:
    """One pass over the batches, up to the number of samples."""
    seen = 0
    for batch in batches:
        yield batch
        size = 1 if samples is None else _sample_count(batch)
        advance(size)
        seen += size
        if samples is not None and seen >= samples:
            return


def _sample_count(batch: Any) -> int:
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    for leaf in leaves:
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise InputError(
        f"calibrate: got samples=, and a batch of type {type(batch).__name__} without a tensor to "
        "count its samples by; leave samples out, or cut the batches yourself"
    )


def _feed(net: nn.Module, batch: Any) -> Any:
    """Run the network on the inputs of a batch, and ignore its labels."""
    device = next(chain(net.parameters(), net.buffers())).device

    def to_device(leaf: Any) -> Any:
        movable = isinstance(leaf, (Tensor, PackedSequence))
        return leaf.to(device) if movable else leaf

    if isinstance(batch, Mapping):
        return net(**tree_map(to_device, _named_inputs(net, batch)))
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        if not batch:
            raise InputError(f"calibrate: got an empty {type(batch).__name__} for a batch")
        return net(tree_map(to_device, batch[0]))
    return net(tree_map(to_device, batch))


def _named_inputs(net: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the network's forward has a parameter for; all, if it takes any keyword."""
    parameters = inspect.signature(getattr(net, "_orig_mod", net).forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    inputs = {name: value for name, value in batch.items() if name in taken}
    if not inputs:
        raise InputError(
            f"calibrate: got a batch with the keys {list(batch)}, none of which the network's "
            f"forward takes ({sorted(taken)}); pass forward=lambda net, batch: ..."
        )
    return inputs


@contextlib.contextmanager
def _progress_bar(show: bool, batches: Iterable[Any], samples: int | None) -> Iterator[Callable[[int], None]]:
    """A function to call with the batches done, or with the samples where their number is given."""
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    total = samples or (len(batches) if isinstance(batches, Sized) else None)
    unit = TextColumn("samples" if samples else "batches")
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), unit, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("calibrate", total=total)

        def advance(done: int) -> None:
            if bar.tasks[0].finished:  # the next pass of several
                bar.reset(task)
            bar.advance(task, done)

        yield advance


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled networks run eagerly: compiled code does not call hooks that came after it."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


# Measuring


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
class _Estimate:
    """What has been measured of one layer's input: all of it, and the sum within the batches."""

    pooled: Moments
    m2_within: Tensor
    degrees_within: Tensor
    uses: int | Tensor = 1  # by step where the statistics are

    @classmethod
    def of(cls, batch: Moments) -> _Estimate:
        uses = (batch.count > 1).long() if batch.mean.ndim == 2 else int(batch.count.max() > 0)
        return cls(batch, batch.m2, (batch.count - 1).clamp(min=0), uses)

    @classmethod
    def of_runs(cls, runs: _Runs) -> _Estimate:
        """All of them at once."""
        each = runs.moments()
        return cls(each.merge_axis(0), each.m2.sum(0), (each.count - 1).sum(), len(runs.values))

    @classmethod
    def empty(cls, like: Tensor) -> _Estimate:
        none = Moments.empty(tuple(like.shape), device=like.device)
        return cls(none, none.m2, none.count, 0)

    def all_reduce(self, group: dist.ProcessGroup | None) -> _Estimate:
        """That of all ranks; the same bits on each."""
        degrees = self.degrees_within.expand_as(self.m2_within)
        uses = torch.zeros_like(self.m2_within) + self.uses
        sums = torch.stack([self.m2_within, degrees, uses])
        dist.all_reduce(sums, group=group)
        total = int(sums[2].flatten()[0]) if sums[2].ndim == 1 else sums[2][:, :1].long()
        return _Estimate(self.pooled.all_reduce(group), sums[0], sums[1], total)

    def merge(self, new: _Estimate) -> _Estimate:
        return _Estimate(
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
                f"calibrate: layer {name!r} got {int(self.pooled.count.max())} value(s) per channel in "
                f"{uses} batch(es), too few for a variance with method={method!r}; give more "
                "samples" + (" or larger batches" if method == "ioffe" else "")
            )
        m2 = self.m2_within if method == "ioffe" else self.pooled.m2
        var = m2 / degrees.clamp(min=1)
        return self.pooled.mean, var * (1 - 1 / self.pooled.count.clamp(min=1)) if biased else var


def _over_ranks(
    measure: Callable[[], dict[str, _Estimate]], layers: dict[str, _BatchNorm], group: dist.ProcessGroup | None
) -> dict[str, _Estimate]:
    """What all ranks measure together, in one order for all."""
    error: BaseException | None = None
    mine: dict[str, _Estimate] = {}
    try:
        mine = measure()
    except BaseException as raised:
        error = raised
    device = _buffers(next(iter(layers.values())))[0].device
    # How many ranks failed; then where each layer ran, so that all take the layers in one order.
    failed = torch.tensor([error is not None], dtype=torch.long, device=device)
    dist.all_reduce(failed, group=group)
    if error is not None:
        raise error
    if failed.item():
        raise InputError(f"calibrate: {failed.item()} other rank(s) failed; the network is unchanged")
    order = list(mine)
    places = [order.index(name) if name in mine else len(layers) for name in layers]
    first = torch.tensor(places, dtype=torch.long, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    merged: dict[str, _Estimate] = {}
    for place, name in sorted(zip(first.tolist(), layers, strict=True), key=lambda pair: pair[0]):
        if place < len(layers):
            part = mine.get(name) or _Estimate.empty(_buffers(layers[name])[0])
            merged[name] = part.all_reduce(group)
    return merged


class _Measurement:
    """A network in evaluation mode whose batch-norm layers are measured; all undone on leaving.

    A layer in evaluation mode normalizes by its buffers. So before each call these are replaced by
    the statistics of that very input: it is then normalized as in training, without an update, by
    any kind of layer (also SyncBatchNorm on a CPU), and for a single value per channel, too. Where a
    channel is one pool, a layer of torch.nn or ours normalizes and is measured in one go instead.
    """

    def __init__(self, net: nn.Module, layers: dict[str, _BatchNorm]) -> None:
        self._layers = layers
        self._modes = [(module, module.training) for module in net.modules()]
        self._buffers = {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}
        self._options = {name: dict(layer.__dict__) for name, layer in layers.items()}
        self._hooks: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self._estimates: dict[str, _Estimate] = {}
        self._runs: dict[str, _Runs] = {}  # what is not in the estimates yet
        self._reached: dict[str, int] = {}  # in which place each layer first ran
        self._tracked: dict[str, Tensor] = {}
        self._batch = 0

    def __enter__(self) -> _Measurement:
        try:
            for module, _ in self._modes:
                module.training = False
            for name, layer in self._layers.items():
                if isinstance(layer, Ours):  # the buffers alone are to normalize, where they can
                    layer.source, layer.update = "batch" if _is_by_batch(layer) else "running", "never"
                    layer.running_mean, layer.running_var = _buffers(layer)  # the domain's
                    # Past the checks: these are no settings of the layer's, and ranks may have unequal batches.
                    layer.__dict__.update(_ALONE)
                hook = self._hook(name)
                if _is_plain(layer):
                    layer.__dict__["forward"] = self._forward(layer, name, hook)
                else:
                    self._hooks[name] = layer.register_forward_pre_hook(hook, with_kwargs=True)
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
    ) -> dict[str, _Estimate]:
        """What one pass measures, by layer, in the order in which the layers first ran."""
        self._estimates, self._runs, self._reached, self._batch = {}, {}, {}, 0
        for batch in batches:
            run(batch)
            self._batch += 1
        self._merge_runs()
        if not self._batch and not may_be_empty:
            raise InputError("calibrate: got no batches; expected at least one")
        return {name: self._estimates[name] for name in self._reached}

    def finish(self, name: str, mean: Tensor, var: Tensor) -> None:
        """Measure this layer no longer: it normalizes by these statistics from now on."""
        layer = self._layers[name]
        self._release(name)
        self._set_buffers(name, mean, var)
        if isinstance(layer, Ours):
            layer.source = "running"
        if _is_by_step(layer):
            assert layer.num_batches_tracked is not None
            self._tracked[name] = layer.num_batches_tracked
            layer.num_batches_tracked = torch.as_tensor(self._estimates[name].uses).flatten()

    def keeps_biased(self, name: str) -> bool:
        return _keeps_biased(self._layers[name])

    def _hook(self, name: str) -> Callable[..., None]:
        def measure(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if isinstance(layer, Ours):
                batch = layer.input_moments(*args, **kwargs)
            else:
                batch = moments(args[0] if args else next(iter(kwargs.values())))
            if not (torch.isfinite(batch.mean) & torch.isfinite(batch.m2)).all():
                self._merge_runs()  # a layer before this one may have met the value first
                raise _not_finite(name, self._batch)
            self._take(name, _Estimate.of(batch))
            if not (isinstance(layer, Ours) and _is_by_batch(layer)):
                self._set_buffers(name, batch.mean, batch.variance(unbiased=False))

        return measure

    def _forward(self, layer: _BatchNorm, name: str, hook: Callable[..., None]) -> Callable[..., Any]:
        """Of a layer whose channels are pools: measures and normalizes its input in one go, where it has values."""
        activation = getattr(layer, "activation", None), getattr(layer, "negative_slope", 0.0)

        def forward(input: Any, residual: Tensor | None = None, **options: Any) -> Any:
            simple = isinstance(input, Tensor) and not input.is_nested and all(v is None for v in options.values())
            values = input.numel() // max(input.shape[1], 1) if simple and input.ndim > 1 else 0
            if values < 2 or is_traced(input):
                given = {**options, "residual": residual} if isinstance(layer, Ours) else options
                hook(layer, (input,), given)
                return type(layer).forward(layer, input, **given)
            layer._check_input_dim(input)
            running = self._buffers[name]
            functional.check(input, *running, layer.weight, layer.bias, residual, activation[0], layer.eps, True)
            y, mean, var = functional.by_batch(input, layer.weight, layer.bias, residual, layer.eps, *activation)
            self._reach(name)
            runs = self._runs.get(name) or self._runs.setdefault(name, _Runs(mean[0]))
            if runs.add(self._batch, values, mean[0], var[0]):
                self._merge_runs()
            return y

        return forward

    def _reach(self, name: str) -> None:
        self._reached.setdefault(name, len(self._reached))

    def _take(self, name: str, new: _Estimate) -> None:
        self._reach(name)
        before = self._estimates.get(name)
        self._estimates[name] = before.merge(new) if before else new

    def _merge_runs(self) -> None:
        """Takes in what has been measured since the last time; raises for the first value that is not finite."""
        first = {name: batch for name, runs in self._runs.items() if (batch := runs.first_not_finite()) is not None}
        if first:
            name = min(first, key=lambda name: (first[name], self._reached[name]))
            raise _not_finite(name, first[name])
        new = {name: _Estimate.of_runs(runs) for name, runs in self._runs.items()}
        for name, estimate in new.items():
            self._take(name, estimate)
        self._runs = {}

    def _set_buffers(self, name: str, mean: Tensor, var: Tensor) -> None:
        old_mean, old_var = self._buffers[name]
        self._layers[name].running_mean = mean.to(old_mean)
        self._layers[name].running_var = var.to(old_var)

    def _release(self, name: str) -> None:
        """The layer's own forward again."""
        if name in self._hooks:
            self._hooks.pop(name).remove()
        else:
            self._layers[name].__dict__.pop("forward", None)

    def _restore(self) -> None:
        for name, (mean, var) in self._buffers.items():
            layer = self._layers[name]
            if name in self._hooks or "forward" not in self._options[name]:
                self._release(name)
            layer.running_mean, layer.running_var = mean, var
            if isinstance(layer, Ours):
                layer.__dict__.update({option: self._options[name][option] for option in _ALONE})
                for option in ("source", "update"):  # last, as these tell the layer what path to take
                    setattr(layer, option, self._options[name][option])
            if name in self._tracked:
                layer.num_batches_tracked = self._tracked[name]
        for module, training in self._modes:
            module.training = training


def _one_by_one(measurement: _Measurement, measure: Callable[[], dict[str, _Estimate]]) -> dict[str, _Estimate]:
    """Measure the first layer that runs, fix its statistics, measure the next, and so on."""
    estimates = measure()
    reached, final = list(estimates), dict[str, _Estimate]()
    while estimates:
        name, estimate = next(iter(estimates.items()))
        final[name] = estimate
        measurement.finish(name, *estimate.statistics(name, "sequential", measurement.keeps_biased(name)))
        estimates = measure() if len(final) < len(reached) else {}
    return final


def _commit(updates: list[tuple[_BatchNorm, str, Tensor, Tensor, int | Tensor]]) -> None:
    """Write the statistics into the layers' own buffers: all of them, or none."""
    for layer, name, *statistics, _ in updates:
        for value, buffer in zip(statistics, _buffers(layer), strict=True):
            if not torch.isfinite(value.to(buffer)).all():
                raise InputError(
                    f"calibrate: the statistics of layer {name!r} overflow its buffers of "
                    f"{buffer.dtype}; keep them in float32"
                )
    changed = [buffer for layer, *_ in updates for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in changed]
    try:
        for layer, _, mean, var, uses in updates:
            running_mean, running_var = _buffers(layer)
            uses, domain = torch.as_tensor(uses), _domain(layer)
            batches = layer.num_batches_tracked
            if batches is not None and domain is not None:
                batches = batches[domain]
            if batches is not None and _is_by_step(layer):  # steps that no batch reached keep what they have
                mean, var = (torch.where(uses > 0, new, old) for new, old in ((mean, running_mean), (var, running_var)))
                batches.copy_(torch.where(uses > 0, uses, batches.view_as(uses)).view_as(batches))
            elif batches is not None:
                batches.copy_(uses.max())
            running_mean.copy_(mean)
            running_var.copy_(var)
    except BaseException:
        for buffer, old in zip(changed, before, strict=True):
            buffer.copy_(old)
        raise
