"""Buffers and flags that a layer's options need, made whenever an option is set."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.nn import options
from batchnorm.nn.outside import keeps_fast_paths_away
from batchnorm.ops.context import Way, can_read, is_compiled, way
from batchnorm.ops.schemas import carry_dtype
from batchnorm.running import MIXED

if TYPE_CHECKING:
    from batchnorm.nn.configured import ConfiguredLayer

FLAGS = ("_call_size", "_is_special", "_estimates", "_varies")
HANDED_IN = ("_source", "_accumulator", "_padding")
"""Attributes by which the package itself puts another source, population or mask into a layer for a time."""
_VARIATIONS = ("renorm", "channel_groups")
_ESTIMATES = ("running", "running_var_kind", "nonfinite", "domains")
_STATISTICS = (("running_mean", 1), ("running_var", 1), ("num_batches_tracked", 0))


def prepare(layer: ConfiguredLayer, name: str) -> None:
    """Makes the buffers that an option needs, and the flags that choose the short call."""
    if name == "nonfinite":
        _count_refusals(layer)
    elif name == "renorm":
        _keep_corrections(layer)
    elif name in options.BY_NAME and options.BY_NAME[name].rows:
        _shape_affine(layer, name)
        _shape_statistics(layer, name)
        if "nonfinite" in layer.__dict__:
            _count_refusals(layer)
    if name == "pool":
        _hook(layer)
    set_flags(layer)


def _hook(layer: ConfiguredLayer) -> None:
    """The hook of a layer over sequences, once."""
    own = layer.pool is not None and not layer.reads_sizes
    for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is keeps_fast_paths_away]:
        del layer._forward_pre_hooks[key]
    if own:
        layer.register_forward_pre_hook(keeps_fast_paths_away)


def carry(layer: ConfiguredLayer) -> Tensor | None:
    """What rounding left of the running statistics: made when it is first needed, and anew when it no longer fits them.

    It is an attribute and no buffer: tools that walk the buffers of a layer of ours beside one of torch's see the same
    ones. A graph that Dynamo traces has none, where it would be compiled twice. A carry that is lost, or is of values
    that somebody else wrote, costs at most one rounding, once.
    """
    mean = layer._buffers.get("running_mean")
    if mean is None or way(mean) is not Way.EAGER or not mean.is_floating_point():
        return None
    kept, dtype = layer.running_carry, carry_dtype(mean.dtype)
    if kept is None or kept.shape[1:] != mean.shape or kept.dtype != dtype or kept.device != mean.device:
        kept = torch.zeros((2, *mean.shape), dtype=dtype, device=mean.device)
        layer.running_carry = kept
    return kept


def forget_carry(layer: ConfiguredLayer) -> None:
    """Starts the carry anew, for running statistics that somebody else has set."""
    layer.running_carry = None


def look_at_times(layer: ConfiguredLayer) -> None:
    """`warn_of_overflow` after 1, 2, 4, 8, ... updates: looking each time would cost as much as a small layer."""
    if is_compiled():
        return
    own = layer.__dict__
    updates = own["_updates"] = own.get("_updates", 0) + 1
    if not updates & (updates - 1):
        warn_of_overflow(layer)


def load_carry(layer: ConfiguredLayer, saved: Any) -> None:
    """Takes over the carry of a state, where it fits the layer's running statistics; else starts anew."""
    forget_carry(layer)
    if isinstance(saved, Tensor) and not saved.is_meta and (own := carry(layer)) is not None:
        if saved.shape == own.shape and saved.dtype == own.dtype:
            own.copy_(saved)
        else:
            forget_carry(layer)


def warn_of_overflow(layer: ConfiguredLayer) -> None:
    """Warns once a layer if its running statistics are not finite, which makes its output constant or NaN."""
    if is_compiled() or layer.__dict__.get("_has_warned"):
        return
    for name in ("running_mean", "running_var"):
        value = layer._buffers.get(name)
        if value is None or value.device.type != "cpu" or not can_read(value) or bool(value.isfinite().all()):
            continue
        layer.__dict__["_has_warned"] = True
        wider = "float32" if _is_narrow(value) else "float64"
        warnings.warn(
            f"{layer._name()}: {name} is not finite. Its input held infinite or NaN values, or statistics beyond what "
            f"{value.dtype} holds: scale the input, keep the layer in {wider}, or refuse such batches with "
            "nonfinite='skip'",
            stacklevel=4,
        )


def set_flags(layer: ConfiguredLayer) -> None:
    """Sets `FLAGS` from the options."""
    handed = any(layer.__dict__.get(name) is not None for name in ("_source", "_accumulator"))
    handed = handed or layer.__dict__.get("running", "ema") not in MIXED
    every = options.changed(layer)
    changed = [option for option in every if not option.in_one_call]
    if layer.__dict__.get("nonfinite") == "skip":
        changed = [option for option in changed if option.name != "nonfinite"]
    varied = [option for option in changed if option.name in _VARIATIONS]
    changed = [option for option in changed if option.name not in _VARIATIONS]
    is_special = handed or len(varied) > 1 or any(not option.parts and not option.belongs for option in changed)
    own = layer.__dict__
    is_simple = not changed or (not varied and all(option.name == "ghost_size" for option in changed))
    is_at_hand = is_simple and not layer.channels_last and own.get("_padding") is None
    own["_is_special"] = is_special
    own["_estimates"] = any(option.name in _ESTIMATES for option in every)
    own["_varies"] = bool(varied)
    own["_call_size"] = own.get("ghost_size", 0) if is_at_hand and not is_special else None


def track(layer: Any, like: Tensor | None) -> None:
    """Gives a layer of torch.nn or of ours running statistics: mean 0, variance 1, no batch.

    ``like`` tells the device where the layer has no parameter.
    """
    own = next(layer.parameters(recurse=False), None)
    place = own if own is not None else like
    wide = own is not None and own.dtype in (torch.float32, torch.float64)
    dtype, device = own.dtype if wide and own is not None else torch.float32, None if place is None else place.device
    layer.register_buffer("running_mean", torch.zeros(layer.num_features, dtype=dtype, device=device))
    layer.register_buffer("running_var", torch.ones(layer.num_features, dtype=dtype, device=device))
    layer.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
    layer.track_running_stats = True
    if "nonfinite" in layer.__dict__:
        _count_refusals(layer)


def untrack(layer: Any, flag: bool) -> None:
    """Undoes `track`; ``flag`` is what ``track_running_stats`` was."""
    for name, _ in _STATISTICS:
        layer.register_buffer(name, None)
    layer.track_running_stats = flag
    if "nonfinite" in layer.__dict__:
        forget_carry(layer)
        _count_refusals(layer)


def _count_refusals(layer: ConfiguredLayer) -> None:
    if layer.nonfinite == "propagate":
        layer._buffers.pop("num_batches_skipped", None)
        return
    batches = layer._buffers.get("num_batches_tracked")
    shape = () if batches is None else tuple(batches.shape)
    shape = (*shape, layer.num_features) if layer.nonfinite == "skip_channel" else shape
    if "num_batches_skipped" not in layer._buffers or layer.num_batches_skipped.shape != shape:
        at = None if layer.running_mean is None else layer.running_mean.device
        layer.register_buffer("num_batches_skipped", torch.zeros(shape, dtype=torch.long, device=at))


def forget_refusals(layer: ConfiguredLayer) -> None:
    """Starts the count of refused batches anew, for as many channels as there are."""
    skipped = layer._buffers.get("num_batches_skipped")
    if skipped is None or not layer.track_running_stats:
        return
    _count_refusals(layer)
    layer.num_batches_skipped.zero_()


@contextlib.contextmanager
def wide_statistics(layer: ConfiguredLayer) -> Iterator[None]:
    """Running statistics of 32 bits or more have no fewer than 32 afterwards, whatever dtype the layer is moved to.

    16 bits hold three digits of a mean and no variance beyond 65,504 (float16), and the kernels take float32 statistics
    beside 16-bit inputs and parameters. The first time a warning tells it. Who wants them narrow makes the layer so
    (``dtype=``), or assigns the buffers.
    """
    wide = {name: value for name in _WIDE if (value := layer._buffers.get(name)) is not None and not _is_narrow(value)}
    yield
    now = {name: value for name in wide if (value := layer._buffers[name]) is not None and _is_narrow(value)}
    for name, value in now.items():
        layer._buffers[name] = wide[name].to(value.device, torch.float32)
    if now:
        _tell_that_they_stay()


def widen_parameters(layer: nn.Module) -> None:
    """Gives gamma and beta of 16 bits 32 beside float32 statistics, as torch's operator wants them."""
    mean = layer._buffers.get("running_mean")
    for parameter in layer._parameters.values():
        if mean is not None and not _is_narrow(mean) and parameter is not None and _is_narrow(parameter):
            parameter.data = parameter.data.float()


_WIDE = ("running_mean", "running_var", "renorm_r", "renorm_d")
_told = False


def _is_narrow(value: Tensor) -> bool:
    return value.dtype in (torch.bfloat16, torch.float16)


def _tell_that_they_stay() -> None:
    global _told
    if not _told and not is_compiled():
        _told = True
        warnings.warn(
            "running statistics of this package's layers stay float32 when a network is converted to 16 bits, which "
            "hold too few digits for a moving average; to have them in 16 bits, construct the layers with dtype=, or "
            "assign the buffers (layer.running_var = layer.running_var.half())",
            stacklevel=6,
        )


def check_shapes(layer: ConfiguredLayer) -> None:
    """Makes r and d anew for other channels, and raises where what the options keep does not fit the channels.

    Tools that prune a network cut weight, bias and running statistics to the channels that stay, and know no others.
    """
    mean, skipped = layer.running_mean, layer._buffers.get("num_batches_skipped")
    if mean is None:
        return
    shape = (*filter(None, options.rows(layer.__dict__)), layer.num_features)
    if mean.shape != shape:
        raise InputError(
            f"{layer._name()}: running_mean is {tuple(mean.shape)}, expected {shape}, the channels last. A tool that "
            "cuts channels cuts domains or time steps here; convert the layer to one set first, as by "
            "bn.convert(net, domains=0)"
        )
    if skipped is not None and layer.nonfinite == "skip_channel" and skipped.shape[-1] != layer.num_features:
        raise InputError(
            f"{layer._name()}: num_batches_skipped counts the refused batches of {skipped.shape[-1]} channels, and "
            f"there are {layer.num_features}. A tool that cut the channels did not know it: set "
            "layer.num_batches_skipped = layer.num_batches_skipped[keep], or call layer.reset_running_stats()"
        )
    if layer.renorm is not None and (layer.renorm_r.shape[0] != layer.num_features or layer.renorm_r.is_meta):
        _keep_corrections(layer)


def settle(layer: ConfiguredLayer) -> None:
    """Takes the buffers that a state does not hold to where the state's are, if the layer was on ``meta`` before."""
    mean, skipped = layer._buffers.get("running_mean"), layer._buffers.get("num_batches_skipped")
    if mean is None or mean.is_meta:
        return
    if skipped is not None and skipped.is_meta:
        layer._buffers["num_batches_skipped"] = torch.zeros(skipped.shape, dtype=torch.long, device=mean.device)
    if layer.renorm is not None and layer.renorm_r.device != mean.device:
        _keep_corrections(layer)


def _keep_corrections(layer: ConfiguredLayer) -> None:
    for name, value in (("renorm_r", torch.ones), ("renorm_d", torch.zeros)):
        if layer.renorm is None:
            layer._buffers.pop(name, None)
            layer._non_persistent_buffers_set.discard(name)
        else:
            mean = layer.running_mean
            dtype, device = (None, None) if mean is None else (mean.dtype, mean.device)
            layer.register_buffer(name, value(layer.num_features, dtype=dtype, device=device), persistent=False)


def _shape_statistics(layer: ConfiguredLayer, name: str) -> None:
    """Rows of running statistics for each domain and time step; rows that are added take the current domain's."""
    domains, steps = options.rows(layer.__dict__)
    shape = tuple(filter(None, (domains, steps)))
    for buffer_name, own in _STATISTICS:
        buffer = layer._buffers.get(buffer_name)
        if buffer is None:
            continue
        lead, tail = buffer.shape[: buffer.ndim - own], buffer.shape[buffer.ndim - own :]
        if lead == shape:
            continue
        # A single axis of rows belongs to the other option, where the layer has that one.
        by_domain = not steps if name == "domains" else bool(domains)
        before = tuple(lead) if len(lead) == 2 else (*lead, 1) if by_domain else (1, *lead)
        kept = buffer.reshape(*before, *tail) if lead else buffer[None, None]
        if len(kept) != max(domains, 1):
            kept = kept[min(layer.domain, len(kept) - 1)][None]
        if kept.shape[1] != max(steps, 1):
            kept = kept[:, :1]
        rows = kept.expand(max(domains, 1), max(steps, 1), *tail)
        layer._buffers[buffer_name] = rows.reshape((*shape, *tail)).clone()
        forget_carry(layer)
    if layer.domain >= max(domains, 1):
        layer.domain = 0


def _shape_affine(layer: ConfiguredLayer, name: str) -> None:
    """Parameters for each domain, or rows of them for each time step; new ones take the values of those in use.

    Those of domain 0 are ``weight`` and ``bias``, those of domain k ``weight_k`` and ``bias_k``. They are no rows of
    one parameter, because an optimizer would go on moving those of a domain that has no batch, by decay and momentum.
    """
    if name == "domains" and not layer.domains and layer.__dict__.get("affine_by") == "domain":
        layer.__dict__["affine_by"] = "shared"  # those in use stay
    domains, steps = options.affine_rows(layer.__dict__)
    shape = (*filter(None, (steps,)), layer.num_features)
    for key in ("weight", "bias"):
        first = layer._parameters.get(key)
        if first is None:
            continue
        there = [first]
        while f"{key}_{len(there)}" in layer._parameters:
            there.append(layer._parameters[f"{key}_{len(there)}"])  # type: ignore[arg-type]
        if len(there) == domains and first.shape == shape:
            continue
        kept = there[min(layer.domain, len(there) - 1)]
        if kept.shape != shape:
            row = kept.detach() if kept.ndim == 1 else kept.detach()[0]
            kept = nn.Parameter(row.expand(shape).clone(), requires_grad=kept.requires_grad)
        for k in range(1, len(there)):
            del layer._parameters[f"{key}_{k}"]
        layer._parameters[key] = kept
        for k in range(1, domains):
            twin = nn.Parameter(kept.detach().clone(), requires_grad=kept.requires_grad)
            layer.register_parameter(f"{key}_{k}", twin)


def affine_keys(layer: ConfiguredLayer) -> list[tuple[str, str]]:
    """The names of gamma and beta, domain by domain; only those that there are."""
    domains, _ = options.affine_rows(layer.__dict__)
    names = [("weight", "bias"), *((f"weight_{k}", f"bias_{k}") for k in range(1, domains))]
    return [pair for pair in names if pair[0] in layer._parameters or pair[1] in layer._parameters]


def fill_in(layer: ConfiguredLayer, state: dict[str, Any], prefix: str) -> None:
    """Adds to a state that is loaded what torch's layers do not have: refused batches, rows of domains and steps."""
    key = prefix + "num_batches_skipped"
    if "num_batches_skipped" in layer._buffers and key not in state:
        state[key] = layer.num_batches_skipped
    for pair in affine_keys(layer)[1:]:
        for name, first in zip(pair, ("weight", "bias"), strict=True):
            if name in layer._parameters and prefix + name not in state and prefix + first in state:
                state[prefix + name] = state[prefix + first].clone()
    for name in (*(name for name, _ in _STATISTICS), "weight", "bias"):
        own, given = layer._buffers.get(name, layer._parameters.get(name)), state.get(prefix + name)
        if own is None or given is None or own.ndim <= given.ndim:
            continue
        if own.shape[own.ndim - given.ndim :] == given.shape:
            # torch's one row serves all domains or steps; `assign=True` makes it the buffer, so each has its own memory
            state[prefix + name] = given.expand(own.shape).clone()
