"""Plain calls of a layer, each at once: in one call of C++, in two operators, in one node of a recorder.

Each gives what `BatchNorm._normalize` gives, or None if it cannot compute the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from batchnorm import functional
from batchnorm.nn import buffers as layer_buffers
from batchnorm.ops import normalization as ops
from batchnorm.ops.context import Way, is_compiled, is_mapped, is_recomputing, way
from batchnorm.ops.fusion import Fusion
from batchnorm.pools import is_alone
from batchnorm.running import momentum_of_next

if TYPE_CHECKING:
    from batchnorm.batch import Batch
    from batchnorm.nn.batch_norm import BatchNorm

Valid = tuple[Tensor | None, Tensor | None, int]
"""Mask, lengths and frames, of `ops.Beside`."""
_ALL: Valid = (None, None, 0)


def at_once(
    layer: BatchNorm, x: Tensor, residual: Tensor | None, mask: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """`forward` of a tensor that is a batch as it stands, or of padded sequences."""
    size = layer._call_size
    if size is None:
        return sequences_in_one_call(layer, x, residual, mask, lengths) if layer.pool == "sequence" else None
    layer._check_input_dim(x)
    if mask is None and lengths is None:
        y = in_one_call(layer, x, residual, size)
        return in_two_calls(layer, x, residual) if y is None and not size else y
    return None if size else in_one_call(layer, x, residual, 0, (mask, lengths, 0))


def batch_at_once(layer: BatchNorm, batch: Batch) -> Tensor | None:
    """The result for a batch whose valid values of a channel, or of a group of channels, are one pool here."""
    if layer._is_special or not isinstance(batch.x, Tensor) or batch.weights is not None or batch.steps:
        return None
    if layer.ghost_size or not is_alone(layer.process_group):
        return None
    valid = None if batch.mask is None else (batch.mask, None, 0)
    return in_one_call(layer, batch.x, batch.residual, 0, valid)


def in_one_call(
    layer: BatchNorm,
    x: ops.Input,
    residual: Tensor | None,
    pool_size: int,
    valid: Valid | None = None,
) -> Tensor | None:
    """`forward` in one call of C++, or None where there is none for it; ``valid`` is None where all values are."""
    if is_compiled():  # no call of C++; to read the layer's settings alone would have Dynamo guard them
        return None
    given = arguments(layer, x, residual, pool_size, valid)
    y = None if given is None else ops.in_one_call(*given)
    if y is not None and layer.updates_statistics:
        layer_buffers.look_at_times(layer)
    return y


def arguments(
    layer: BatchNorm, x: ops.Input, residual: Tensor | None, pool_size: int, valid: Valid | None = None
) -> ops.Arguments | None:
    """Those of the call in C++; None where there is none for the layer."""
    beside = None
    if pool_size or layer._varies or valid is not None:
        if isinstance(x, Tensor) and (x.ndim < 2 or x.shape[1] != layer.num_features):
            return None
        if (layer._varies or valid is not None) and (beside := _beside(layer, valid or _ALL)) is None:
            return None
    # Straight from the dictionaries: Module's own look-up costs as much as a small kernel. A parametrized weight is
    # in none of them.
    parameters, buffers = layer._parameters, layer._buffers
    use_batch, updates = layer.normalizes_by_batch, layer.updates_statistics
    weight = parameters["weight"] if "weight" in parameters else layer.weight  # noqa: SIM401
    bias = parameters["bias"] if "bias" in parameters else layer.bias  # noqa: SIM401
    mean = var = carry = None
    if updates and (carry := layer.running_carry) is None:
        carry = layer_buffers.carry(layer)
    if updates or not use_batch or layer._varies:
        mean = buffers["running_mean"] if "running_mean" in buffers else layer.running_mean  # noqa: SIM401
        var = buffers["running_var"] if "running_var" in buffers else layer.running_var  # noqa: SIM401
    batches, momentum, skipped, unbiased = buffers.get("num_batches_tracked"), layer.momentum, None, True
    if layer._estimates:
        if is_mapped() or layer.affine_by != "shared" or (mean is not None and not mean.is_cpu):
            return None
        skipped, unbiased = buffers.get("num_batches_skipped"), layer.running_var_kind == "unbiased"
        if layer.domains and mean is not None and var is not None:
            row = layer.domain
            mean, var, carry = mean[row], var[row], None if carry is None else carry[:, row]
            batches, skipped = (None if each is None else each[row] for each in (batches, skipped))
        if updates:
            momentum = momentum_of_next(layer.running, momentum, batches)
    return (
        x, residual, weight, bias, mean, var, batches, carry, momentum, layer.eps, layer.activation,
        layer.negative_slope, use_batch, updates, pool_size, layer.keeps_output, unbiased, skipped, beside,
    )  # fmt: skip


def with_depthwise(
    layer: BatchNorm, x: Tensor, kernels: Tensor, convolution: tuple[Any, ...], before: BatchNorm | None
) -> Tensor | None:
    """`forward` of a depthwise convolution of x, or of ``before(x)``, in one call of C++; None where there is none.

    The convolution: its bias, stride, padding and dilation.
    """
    if is_compiled():
        return None
    first = None
    if before is not None:
        given = arguments(before, x, None, 0)
        first = None if given is None else ops.in_codes(given)
        if first is None:
            return None
    y = in_one_call(layer, (x, kernels, *convolution, first), None, 0)
    if y is not None and before is not None and before.updates_statistics:
        layer_buffers.look_at_times(before)
    return y


def sequences_in_one_call(
    layer: BatchNorm, x: Tensor, residual: Tensor | None, mask: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """`forward` of padded sequences (batch, time, C), or with the time first, in one call of C++; None elsewhere."""
    if layer._is_special or layer._padding is not None or layer.ghost_size or x.ndim != 3:
        return None
    if not (is_alone(layer.process_group) and (residual is None or residual.shape == x.shape)):
        return None
    valid: Valid | None = None
    if mask is not None or lengths is not None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == x.shape[:2]):
            return None
        frames = x.shape[1] if layer.batch_first else -x.shape[0]
        valid = (None if mask is None else mask.flatten(), lengths, frames)
    added = None if residual is None else residual.flatten(0, 1)
    y = in_one_call(layer, x.flatten(0, 1), added, 0, valid)
    return None if y is None else y.view(x.shape)


def _beside(layer: BatchNorm, valid: Valid) -> ops.Beside | None:
    """What the call has beside the plain one; None where C++ cannot compute it."""
    if way() is not Way.EAGER:
        return None
    if not layer.normalizes_by_batch:
        return ops.Beside(*valid)
    if layer.renorm is None or layer.running_mean is None:
        return ops.Beside(*valid, layer.channel_groups)
    buffers = layer._buffers
    r, d, batches = buffers.get("renorm_r"), buffers.get("renorm_d"), buffers.get("num_batches_tracked")
    if r is None or d is None:
        return None
    if is_recomputing():  # the forward that it repeats has left them
        return ops.Beside(*valid, layer.channel_groups, r, d)
    if batches is None or not batches.is_cpu:
        return None
    batches = batches[layer.domain] if layer.domains else batches
    return ops.Beside(*valid, layer.channel_groups, r, d, *layer.renorm.limits(int(batches)))


def in_two_calls(layer: BatchNorm, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """The same through Python, or None for a recorder, for vmap and for a layer without the statistics it needs."""
    if layer._estimates or layer._varies:
        return None
    use_batch, updates, how = layer.normalizes_by_batch, layer.updates_statistics, way(x)
    mean, var, fusion = layer.running_mean, layer.running_var, layer._fusion(residual)
    lacks_statistics = not use_batch and (mean is None or var is None)
    if lacks_statistics or how is Way.RECORDED or (how is Way.TRANSFORMED and is_mapped()):
        return None
    tracked = updates or not use_batch
    functional.check(x, mean if tracked else None, var if tracked else None, fusion, use_batch, layer._advice)
    batches, carry = layer._buffers.get("num_batches_tracked"), None
    if updates and how is Way.EAGER and mean is not None:
        carry = layer_buffers.carry(layer)
    return ops.in_two_calls(x, fusion, mean, var, batches, layer.momentum, use_batch, updates, carry)


def in_one_node(layer: BatchNorm, x: Tensor, fusion: Fusion) -> Tensor | None:
    """`forward` for a recorder as one batch norm of ATen's, or None where there is none for it."""
    use_batch, updates = layer.normalizes_by_batch, layer.updates_statistics
    if layer._call_size != 0 or layer._varies or (updates and (layer.momentum is None or not use_batch)):
        return None
    if layer._estimates and (updates or layer.domains):
        return None
    if updates and layer.num_batches_tracked is not None:
        ops.count_one(layer.num_batches_tracked, x)
    tracked = updates or not use_batch
    mean, var = (layer.running_mean, layer.running_var) if tracked else (None, None)
    return ops.in_one_node(x, fusion, mean, var, use_batch, 0.0 if layer.momentum is None else layer.momentum)
