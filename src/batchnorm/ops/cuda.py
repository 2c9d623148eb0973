"""The operators on CUDA: Triton kernels where they serve a tensor, else `NotImplemented`, and ATen takes it.

Triton is imported when the first CUDA tensor comes, and its kernels are tried once on each device. That choice then
stays: bits that a forward packs are read by the backward of the same implementation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import aten
from batchnorm.ops.schemas import ACTIVATIONS, signs_size

_reasons: dict[torch.device, str | None] = {}  # why Triton does not serve a device; None: it does
_kernels: Any = None


def reason(device: torch.device) -> str | None:
    """Why the Triton kernels do not serve a device; None where they do. Tries them on the first call."""
    if device not in _reasons:
        _reasons[device] = _try(device)
        if _reasons[device]:
            warnings.warn(
                f"batchnorm: ATen operations serve {device}, because {_reasons[device]}", RuntimeWarning, stacklevel=3
            )
    return _reasons[device]


def describe(device: torch.device) -> str:
    """What serves a device, and why, for `show_config`."""
    why = reason(device)
    if why:
        return f"ATen operations, because {why}"
    measured = _kernels.triton_table.MEASURED
    tuned = f"tuned on {measured['device']}" if measured else "not tuned on any device"
    return f"Triton {_kernels.VERSION}, {tuned}"


def _try(device: torch.device) -> str | None:
    global _kernels
    try:
        from batchnorm.kernels import triton
    except ImportError as failure:
        return f"triton does not load ({failure}): pip install 'batchnorm[gpu]'"
    _kernels = triton
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # a graph is being captured: nothing may be read back
    try:
        self_test(device)
    except Exception as failure:  # whatever a compiler or driver raises must not stop a network from training
        return f"the Triton kernels failed their self-test: {type(failure).__name__}: {str(failure).strip()[:500]}"
    return None


def self_test(device: torch.device) -> None:
    """Compares one forward and backward of the Triton kernels with ATen's; raises where they differ."""
    generator = torch.Generator().manual_seed(0)
    x, dy, residual, weight, bias = (
        torch.randn(size, generator=generator).to(device) for size in ((6, 5, 3, 7),) * 3 + ((5,),) * 2
    )
    signs = torch.empty(signs_size(x), dtype=torch.uint8, device=device)
    settings = (4, 1e-5, "relu", 0.0)
    y, mean, var = _kernels.forward(x, weight, bias, residual, *settings, signs)
    torch.testing.assert_close((y, mean, var), aten.forward(x, weight, bias, residual, *settings), rtol=1e-4, atol=1e-5)
    ours = _kernels.backward(dy, x, weight, bias, None, signs, mean, var, *settings, False, True, True)
    truth = aten.gradients(dy, x, weight, bias, residual, mean, var, *settings, False)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


def serving(x: Tensor, pool_size: int) -> Any:
    """The Triton kernels where they take x, else None."""
    return _kernels if reason(x.device) is None and _kernels.supports(x, pool_size) else None


def _nothing(t: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if t is None else t


def _signs(x: Tensor, save: bool) -> Tensor:
    return x.new_empty(signs_size(x) if save else 0, dtype=torch.uint8)


def _moments(name: str) -> Callable[[Any], Any]:
    """An operator that measures x."""

    def operator(a: Any) -> Any:
        kernels = serving(a.x, a.pool_size)
        return NotImplemented if kernels is None else getattr(kernels, name)(a.x, a.pool_size, a.mask)

    return operator


def _transform(name: str) -> Callable[[Any], Any]:
    """A forward operator: the kernel is given signs to fill in, where they are to be saved."""

    def operator(a: Any) -> Any:
        kernels = serving(a.x, a.pool_size)
        if kernels is None:
            return NotImplemented
        signs = _signs(a.x, a.save_signs)
        settings = a._asdict()
        save = settings.pop("save_signs")
        settings.pop("own", None)  # it is all one here
        settings.update(activation=ACTIVATIONS[a.activation], signs=signs if save else None)
        results = getattr(kernels, name)(**settings)
        return *(results if isinstance(results, tuple) else (results,)), signs

    return operator


def _gradient(name: str) -> Callable[[Any], Any]:
    """A backward operator: gradients that are not wanted are empty."""

    def operator(a: Any) -> Any:
        kernels = serving(a.x, a.pool_size)
        if kernels is None:
            return NotImplemented
        results = getattr(kernels, name)(**a._replace(activation=ACTIVATIONS[a.activation])._asdict())
        return tuple(_nothing(t, a.x) for t in results)

    return operator


def _update_statistics(a: Any) -> Any:
    updated = (a.running_mean, a.running_var, a.num_batches_tracked)
    if reason(a.mean.device) is not None or not _kernels.updates(*updated, a.mean, a.carry):
        return NotImplemented
    _kernels.update_statistics(**a._asdict())
    return None


def _not_here(a: Any) -> Any:
    """An operator that has no kernel of its own."""
    return NotImplemented


_operators: dict[str, Callable[[Any], Any]] = {
    **{name: _moments(name) for name in ("moments", "count_moments")},
    **{name: _transform(name) for name in ("normalize", "normalize_merged", "forward")},
    **{name: _gradient(name) for name in ("backward_reduce", "backward_apply", "backward_merged", "backward")},
    "update_statistics": _update_statistics,
    **dict.fromkeys(("mix_statistics", "reduce_merged"), _not_here),
}


def implementation(name: str, otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The operator of that name: ours, and where it does not take the arguments, the other."""
    ours = _operators[name]

    def operator(a: Any) -> Any:
        result = ours(a)
        return otherwise(a) if result is NotImplemented else result

    return operator
