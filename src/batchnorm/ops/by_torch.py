"""Plain eager calls by torch's own operator, where ours would cost more: without `_autograd`, or without C++ at all.

Such a call then costs as much as one of torch.nn's layers, and has torch's bits: running statistics keep no carry of
what rounding left, since the few operations that this takes would cost more than the call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.kernels import aten
from batchnorm.ops.context import is_transformed
from batchnorm.ops.schemas import ACTIVATIONS

_C = torch._C
_TENSORS = (Tensor, torch.nn.Parameter)
_NARROW = (torch.bfloat16, torch.float16)


def by_torch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    slope: float,
    use_batch: bool,
    update: bool,
) -> Tensor | None:
    """activation(BN(x) + residual), with the running statistics updated; None, with nothing done, for any other call.

    It checks little, because looks at tensors are what a small call costs. torch refuses what does not fit before it
    changes anything, and such a call then gets its error from the checks of batchnorm.
    """
    if type(x) not in _TENSORS or not x.is_cpu or x.ndim < 2 or _is_watched() or not 0 < eps < math.inf:
        return None
    if (running_mean is None) != (running_var is None) or x.numel() <= (x.shape[1] if use_batch else 0):
        return None
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        return None
    if x.ndim > 3 and torch.is_grad_enabled() and (x.shape[0] == 1 or 1 in x.shape[2:]):
        # Strides of an axis of one element are free, and by them torch 2.13 takes x or dy for planes or for channels
        # last: where it errs, all gradients of its operator are wrong.
        return None
    if activation is not None and activation not in ACTIVATIONS:
        return None
    if not use_batch:
        if running_mean is None or running_var is None or update:
            return None
        if torch.is_grad_enabled():  # they may move on before the backward, and torch keeps no copy
            running_mean, running_var = running_mean.clone(), running_var.clone()
    elif not update:
        running_mean = running_var = None
    elif running_mean is not None and running_mean.dtype in (torch.bfloat16, torch.float16):
        return None  # which would stick without a carry
    elif momentum is None:
        if num_batches_tracked is None:
            return None
        momentum = 1.0 / (int(num_batches_tracked) + 1)
    elif not math.isfinite(momentum):
        return None
    if running_mean is not None and running_mean.dtype is torch.float32:  # torch wants all four vectors alike
        weight, bias = (t.float() if t is not None and t.dtype in _NARROW else t for t in (weight, bias))
    try:
        y = torch.batch_norm(x, weight, bias, running_mean, running_var, use_batch, momentum or 0.0, eps, False)
    except RuntimeError:
        return None
    if update and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if residual is not None:
        y = y.add_(residual)
    if activation == "relu":
        return y.relu_()
    return y if activation is None else aten.activate(y, activation, slope)


def _is_watched() -> bool:
    """Whether a mode, a transform, a tangent or tracing is at work, which must see our own operators."""
    return bool(
        _C._len_torch_function_stack()
        or _C._len_torch_dispatch_stack()
        or is_transformed()
        or _C._get_tracing_state() is not None
    )
