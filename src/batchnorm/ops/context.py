"""How a call is made: in eager mode, compiled, recorded for another runtime, or transformed.

Each of these ways needs other code. This module alone asks torch which of them it is.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from batchnorm.pools import is_exported


class Way(enum.Enum):
    """The ways in which a call is made."""

    EAGER = "eager"
    COMPILED = "compiled"
    """Dynamo traces the call. It does not take autograd functions that have a `jvp`."""
    RECORDED = "recorded"
    """torch.export, torch.jit.trace or torch.fx records the call for runtimes that know ATen's operators alone."""
    TRANSFORMED = "transformed"
    """A transform of torch.func is active, or forward mode."""


def way(x: Any = None) -> Way:
    """The way of a call on x, which torch.fx replaces by a proxy."""
    if is_recorded(x):
        return Way.RECORDED
    if is_compiled():
        return Way.COMPILED
    return Way.TRANSFORMED if is_transformed() else Way.EAGER


def is_recorded(x: Any = None) -> bool:
    """Whether the call is recorded for other runtimes."""
    if x is not None and not isinstance(x, Tensor):  # a proxy of torch.fx
        return True
    return is_exported() or is_traced_by_jit()


def is_traced_by_jit() -> bool:
    """Whether torch.jit.trace records the call, for which sizes are tensors."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


is_compiled = torch.compiler.is_compiling
"""Whether Dynamo or torch.export traces the call; eager calls ask this first, so it costs no call of its own."""


def is_graphed() -> bool:
    """Whether the operators that run now may go into a graph: Dynamo traces, or a dispatch mode sees each of them."""
    return is_compiled() or torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a transform of torch.func is active, or forward mode; eager calls alone may ask."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_mapped() -> bool:
    """Whether vmap is active, for which `batchnorm::update_statistics` has no rule."""
    if is_compiled() or not torch._C._are_functorch_transforms_active():
        return False
    return any(level.key() == TransformType.Vmap for level in retrieve_all_functorch_interpreters())


def is_in_forward_mode() -> bool:
    """Whether tangents may ride on tensors."""
    return forward_ad._current_level >= 0


def is_recomputing() -> bool:
    """Whether a backward is running: a forward inside it is a recomputation, not a new batch."""
    return not is_compiled() and torch._C._current_graph_task_id() != -1


def eager() -> contextlib.AbstractContextManager[Any]:
    """Within it compiled networks run eagerly: compiled code does not call hooks that came after it."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def can_read(x: Tensor) -> bool:
    """Whether a value of x can be read back to Python: it waits for no device, and breaks no graph."""
    return x.device.type == "cpu" and way(x) is Way.EAGER


def is_opaque(x: Tensor) -> bool:
    """Whether an operator that changes its arguments may stand for a computation on x, as one opaque step.

    Recorders want ATen's operators, and transforms of torch.func those that they have rules for.
    """
    return way(x) in (Way.EAGER, Way.COMPILED)
