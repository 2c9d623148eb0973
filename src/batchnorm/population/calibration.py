"""Exact population statistics for every batch-norm layer of a network, by a pass over data."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm import data
from batchnorm.data.measuring import checked_columns
from batchnorm.data.reading import check_batch_size
from batchnorm.data.sources import Local, is_dataset, source_of
from batchnorm.data.waiting import TIMEOUT, check_timeout
from batchnorm.errors import InputError
from batchnorm.nn import batch_norm as ours
from batchnorm.nn import buffers
from batchnorm.ops.context import eager
from batchnorm.pools import process_group as process_group_of
from batchnorm.population.feeding import Lengths, feed, progress_bar, read_batches, with_lengths
from batchnorm.population.measuring import (
    Estimate,
    Measurement,
    Method,
    buffers_of,
    domain_of,
    is_by_step,
    keeps_biased,
)
from batchnorm.population.merging import over_ranks
from batchnorm.population.partitions import float_dtype, measure_partitions
from batchnorm.undo import Values, kept

Net = TypeVar("Net", bound=nn.Module)


def calibrate(
    net: Net,
    batches: Any,
    *,
    method: Method = "pooled",
    forward: Callable[[Net, Any], Any] | None = None,
    samples: int | None = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | Literal["world"] | None = None,
    batch_size: int | None = None,
    columns: Sequence[str] | None = None,
    timeout: float = TIMEOUT,
    lengths: Lengths | None = None,
    track_running_stats: bool = False,
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

    Args:
        net: any network with batch-norm layers (torch's, SyncBatchNorm included, or ours).
        batches: an iterable of what the network takes; a tensor is one batch. `"sequential"` needs
            one that can be read again, such as a list or a DataLoader. Or a data set: files (.npy, Parquet,
            Arrow), arrays and tables, which are read in bounded memory; or one of Ray, Spark or Dask, which its
            workers measure where it lies. The batches are then the next `batch_size` rows of the data set in its
            order, so the result is that of one process up to rounding, however the data are cut.
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
        batch_size: rows of a batch of a data set; needed for one, and for nothing else.
        columns: of a data set, by default all. Columns of numbers are the features (N, C); a single column of arrays
            is (N, ...); columns of arrays beside others are a dict.
        timeout: seconds to wait for Ray, Spark or Dask, or for other ranks after this rank's own pass.
        lengths: where a batch of padded sequences has their valid lengths: a key, a place in the tuple, or a function
            of the batch. Layers then know them as in `mask_padding`. None: all frames count.
        track_running_stats: give running statistics to layers that keep none (``track_running_stats=False``), which
            then normalize by them in evaluation and update them in training; layers with ``source="batch"`` are
            left alone. A layer whose attribute of this name is True gets them in any case.

    Returns:
        The network, its statistics replaced and all else (modes, hooks, momentum) as it was.

    Raises:
        InputError: no batch-norm layer, no batch, a one-shot iterator for `"sequential"`, an input
            that is not finite (named by layer and batch), too few values for a variance. On this
            and any other error, Ctrl-C included, the network is left exactly as it was.

    Warns:
        UserWarning: layers without running statistics, or that no batch reached, are left alone.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 10; Chan, Golub & LeVeque 1983 (merging).

    Examples:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> batches = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0]])]
        >>> calibrate(net, batches)[0].running_mean
        tensor([4.])
    """
    if method not in get_args(Method):
        raise InputError(f"calibrate: got method={method!r}; expected one of {get_args(Method)}")
    if samples is not None and samples < 1:
        raise InputError(f"calibrate: got samples={samples}; expected at least 1, or None for all")
    with _tracked(net, track_running_stats):
        layers = _layers_with_statistics(net)
        run = with_lengths(forward or feed, lengths)
        if isinstance(batches, Tensor):
            batches = [batches]
        if is_dataset(batches):
            check_batch_size("calibrate", batch_size)
            assert batch_size is not None
            source = source_of(batches, "calibrate")
            if not isinstance(source, Local):
                if samples is not None or process_group is not None:
                    raise InputError(
                        "calibrate: got samples= or process_group= for a data set that an engine reads whole"
                    )
                estimates = measure_partitions(
                    net,
                    layers,
                    source,
                    method=method,
                    forward=forward if lengths is None else run,
                    batch_size=batch_size,
                    columns=checked_columns("calibrate", columns),
                    timeout=check_timeout("calibrate", timeout),
                )
                return _replace(net, layers, estimates, method)
            batches = data.batches(batches, batch_size=batch_size, columns=columns, dtype=float_dtype(net))
        elif batch_size is not None or columns is not None:
            raise InputError("calibrate: got batch_size= or columns= for batches, which are cut already")
        if isinstance(batches, Mapping):
            raise InputError("calibrate: got one dict for batches; expected an iterable, such as [dict]")
        if method == "sequential" and len(layers) > 1 and iter(batches) is batches:
            raise InputError(
                f"calibrate: got a one-shot {type(batches).__name__} for method='sequential', which "
                "reads the batches once a layer; expected a list, a DataLoader, or the like"
            )
        with (
            torch.no_grad(),
            eager(),
            progress_bar("calibrate", progress, batches, samples) as advance,
            Measurement(net, layers) as measurement,
        ):

            def measure() -> dict[str, Estimate]:
                read = read_batches(batches, samples, advance)
                if process_group is None:
                    return measurement.over(read, lambda batch: run(net, batch))
                return over_ranks(
                    lambda: measurement.over(read, lambda batch: run(net, batch), may_be_empty=True),
                    layers,
                    process_group_of(process_group),
                    check_timeout("calibrate", timeout),
                )

            estimates = _one_by_one(measurement, measure) if method == "sequential" else measure()
        return _replace(net, layers, estimates, method)


@contextlib.contextmanager
def _tracked(net: nn.Module, asked: bool) -> Iterator[None]:
    """Running statistics for layers that have none and are asked to keep them; taken away again by an error."""
    modules = net.modules() if isinstance(net, nn.Module) else ()
    without = [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is None]
    wanted = [m for m in without if (asked or m.track_running_stats) and getattr(m, "source", "auto") != "batch"]
    flags = [layer.track_running_stats for layer in wanted]
    like = next(net.parameters(), None) if wanted else None
    try:
        for layer in wanted:
            buffers.track(layer, like)
        yield
    except BaseException:
        for layer, flag in zip(wanted, flags, strict=True):
            buffers.untrack(layer, flag)
        raise
    for layer, flag in zip(wanted, flags, strict=True):
        if not layer.num_batches_tracked:  # no batch reached it
            buffers.untrack(layer, flag)


def _replace(net: Net, layers: dict[str, _BatchNorm], estimates: dict[str, Estimate], method: Method) -> Net:
    """Give the layers the statistics that were measured."""
    new = {name: e.statistics(name, method, keeps_biased(layers[name])) for name, e in estimates.items()}
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
            "(track_running_stats=False), so there is nothing to replace; give them some by "
            "bn.calibrate(net, batches, track_running_stats=True)"
        )
    lazy = [name for name, layer in kept.items() if is_lazy(buffers_of(layer)[0])]
    if lazy:
        raise InputError(f"calibrate: layers {lazy} are not initialized; run the network on a batch first")
    for name, layer in kept.items():
        size = buffers_of(layer)[0].numel()
        if not isinstance(layer, ours.BatchNorm) and size != layer.num_features:
            raise InputError(
                f"calibrate: layer {name!r} is a {type(layer).__name__}, which keeps {size} running means for "
                f"{layer.num_features} channels, and one a channel is measured; put a class of torch.nn in its place"
            )
    _warn("keep no running statistics", [name for name in found if name not in kept])
    return kept


def _warn(what: str, names: list[str]) -> None:
    if names:
        warnings.warn(f"calibrate: layers {names} {what} and are left alone", stacklevel=4)


def _one_by_one(measurement: Measurement, measure: Callable[[], dict[str, Estimate]]) -> dict[str, Estimate]:
    """Measure the first layer that runs, fix its statistics, measure the next, and so on."""
    estimates = measure()
    reached, final = list(estimates), dict[str, Estimate]()
    while estimates:
        name, estimate = next(iter(estimates.items()))
        final[name] = estimate
        measurement.finish(name, *estimate.statistics(name, "sequential", measurement.keeps_biased(name)))
        estimates = measure() if len(final) < len(reached) else {}
    return final


def _advice(dtype: torch.dtype) -> str:
    narrow = dtype in (torch.float16, torch.bfloat16)
    return "keep them in float32" if narrow else "scale the input of the layer, or keep the layer in float64"


def _commit(updates: list[tuple[_BatchNorm, str, Tensor, Tensor, int | Tensor]]) -> None:
    """Write the statistics into the layers' own buffers: all of them, or none."""
    for layer, name, *statistics, _ in updates:
        for value, buffer in zip(statistics, buffers_of(layer), strict=True):
            if not torch.isfinite(value.to(buffer)).all():
                raise InputError(
                    f"calibrate: the statistics of layer {name!r} overflow its buffers of "
                    f"{buffer.dtype}; {_advice(buffer.dtype)}"
                )
    with kept(Values(b for layer, *_ in updates for b in layer.buffers(recurse=False)), if_it_fails=True):
        for layer, _, mean, var, uses in updates:
            running_mean, running_var = buffers_of(layer)
            uses, domain = torch.as_tensor(uses), domain_of(layer)
            batches = layer.num_batches_tracked
            if batches is not None and domain is not None:
                batches = batches[domain]
            if batches is not None and is_by_step(layer):  # steps that no batch reached keep what they have
                mean, var = (torch.where(uses > 0, new, old) for new, old in ((mean, running_mean), (var, running_var)))
                batches.copy_(torch.where(uses > 0, uses, batches.view_as(uses)).view_as(batches))
            elif batches is not None:
                batches.copy_(uses.max())
            running_mean.copy_(mean)
            running_var.copy_(var)
