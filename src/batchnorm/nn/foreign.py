"""Other people's subclasses of torch.nn's batch normalization, with our layer as the normalization inside them.

A class such as ``BatchNormAct2d`` normalizes once, by its own statistics, and does more: an activation, dropout, a
mask. Its layers get a class that inherits from theirs and from ours. Their ``forward`` is called as it is; the one
normalization in it, whether it is ``super().forward(x)`` or ``F.batch_norm(x, self.running_mean, ...)``, is computed
by our layer. So modes, freezing, accumulation and calibration mean the same as everywhere. A trial run on copies
decides whether a class is of this kind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from batchnorm.nn import batch_norm as ours
from batchnorm.nn import buffers, options
from batchnorm.nn.leaves import is_of_this_package, recorded_call
from batchnorm.undo import in_mode

_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SHAPES: dict[type[nn.Module], tuple[tuple[int, ...], ...]] = {
    nn.BatchNorm1d: ((), (5,)),
    nn.BatchNorm2d: ((3, 4),),
    nn.BatchNorm3d: ((2, 3, 2),),
}
_ANY_SHAPE = ((3, 4), (), (5,), (2, 3, 2))  # of space, the likeliest first
_SAMPLES = 4


class ForeignBatchNorm(ours.BatchNorm):
    """What the classes share that are made for other people's layers."""

    theirs: type[nn.Module]
    style: str

    def _lost_in_a_swap(self, caller: str) -> str | None:
        if self.theirs.__module__.partition(".")[0] != caller.partition(".")[0]:
            return super()._lost_in_a_swap(caller) or f"the forward of {self.theirs.__qualname__}"
        # Their package knows its own classes, and so an activation that our forward took from theirs, but no modes.
        kept = {"process_group", *(("activation", "negative_slope") if self.style == "fused" else ())}
        return options.spelled_out(self, kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.theirs, self.style), self.__getstate__()


def _forward(kind: type[nn.Module], style: str) -> Callable[..., Any]:
    """The forward of a made class. It is no method of `ForeignBatchNorm`, where ``super().forward`` of theirs leads."""
    if style == "fused":  # all that their forward does is among our options
        return ours.BatchNorm.forward

    def forward(self: ForeignBatchNorm, *args: Any, **kwargs: Any) -> Any:
        recorded = recorded_call(self, args, kwargs)
        if recorded is not None:
            return recorded
        if style == "super":
            return kind.forward(self, *args, **kwargs)
        with _Normalization(self):
            return kind.forward(self, *args, **kwargs)

    forward.__module__ = kind.__module__  # it computes what theirs does
    forward.__doc__ = kind.forward.__doc__
    return forward


class _Normalization(TorchFunctionMode):
    """Within it the layer's call of ``batch_norm`` is our layer's normalization; every other call stays.

    Outside that call the layer is in evaluation mode: a forward that calls ``batch_norm`` itself counts batches and
    chooses the statistics by that flag, and both are the affair of our layer.
    """

    def __init__(self, layer: ForeignBatchNorm) -> None:
        super().__init__()
        self.layer = layer
        self.training = layer.training

    def __enter__(self) -> Any:
        self.layer.__dict__["training"] = False
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self.layer.__dict__["training"] = self.training
        return super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.batch_norm, torch.batch_norm):
            return func(*args, **kwargs)
        names = _FUNCTION if func is F.batch_norm else _OPERATOR
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        layer = self.layer
        if given.get("running_mean") is not layer.running_mean or given.get("weight") is not layer.weight:
            return func(*args, **kwargs)  # the normalization of something else
        layer.__dict__["training"] = self.training
        try:
            return ours.BatchNorm.forward(layer, given["input"])
        finally:
            layer.__dict__["training"] = False


# Their arguments' names, in order.
_FUNCTION = tuple(inspect.signature(F.batch_norm).parameters)
_OPERATOR = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


def counterpart(layer: nn.Module) -> type[ForeignBatchNorm] | str:
    """The class that gives a layer of another class modes, or the reason why there is none.

    Nothing is changed: the trial runs on copies.
    """
    kind: type[nn.Module] = type(layer)
    if kind.__call__ is not nn.Module.__call__ or "forward" in layer.__dict__:
        return "has a forward or a __call__ of its own that is not its class's"
    taken = [name for name in options.DEFAULTS if name in layer.__dict__ or hasattr(kind, name)]
    taken = [name for name in taken if not (name == "process_group" and isinstance(layer, nn.SyncBatchNorm))]
    if taken:
        return f"has an attribute {taken[0]!r} of its own, which is an option of our layers with another meaning"
    if kind is nn.SyncBatchNorm:
        return class_for(kind, "function")
    reasons = []
    for style in ("super", "function"):
        made = class_for(kind, style)
        try:
            reason = _trial(layer, made)
        except Exception as error:  # whatever a forward of any class raises
            reason = _failure(error)
        if reason is None:
            return made
        reasons.append(reason)
    return reasons[-1]


_made: dict[tuple[type[nn.Module], str], type[ForeignBatchNorm]] = {}


def class_for(kind: type[nn.Module], style: str) -> type[ForeignBatchNorm]:
    """The class made of theirs and ours, always the same; of style "super", "function" or "fused" (our forward)."""
    if (kind, style) not in _made:
        _made[kind, style] = _make(kind, style)
    return _made[kind, style]


def _make(kind: type[nn.Module], style: str) -> type[ForeignBatchNorm]:
    pairs = zip(_TORCH, ours.BY_RANK.values(), strict=True)
    base = next((own for theirs, own in pairs if issubclass(kind, theirs)), None)
    bases = (kind, ForeignBatchNorm) if base is None else (kind, ForeignBatchNorm, base)
    members = {
        "theirs": kind,
        "style": style,
        "forward": _forward(kind, style),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": ForeignBatchNorm.__reduce_ex__,
        "__deepcopy__": ours.BatchNorm.__deepcopy__,
    }
    return type(kind.__name__, bases, members)


def _rebuild(kind: type[nn.Module], style: str) -> nn.Module:
    made = class_for(kind, style)
    return made.__new__(made)


def _failure(error: Exception) -> str:
    return f"fails in a trial run ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


# The trial


def _trial(layer: nn.Module, made: type[ForeignBatchNorm] | None) -> str | None:
    """Why the made class does not compute what the layer's own class does, on inputs of the layer's own shapes."""
    taken = 0
    for x in _inputs(layer):
        if not _takes(layer, x):
            continue
        taken += 1
        reason = _differs(layer, made, x)
        if reason is not None:
            return reason
        if not isinstance(layer, _TORCH):
            break  # any rank will do, and the others may mean something else
    return None if taken else "takes none of the inputs of its class"


def _inputs(layer: Any) -> Iterator[Tensor]:
    like = next((t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), torch.empty(0))
    shapes = next((s for theirs, s in _SHAPES.items() if isinstance(layer, theirs)), _ANY_SHAPE)
    channels = layer.num_features
    spaces = [tuple(size + 4 * (size == channels) for size in space) for space in shapes]
    first = [(channels, *space) for space in spaces]
    for axes in (*first, *((*space, channels) for space in spaces if space)):  # the channels may come last
        generator = torch.Generator().manual_seed(len(axes))
        x = torch.randn(_SAMPLES, *axes, generator=generator)
        yield (2 * x + 1).to(like.device, torch.float64 if like.dtype is torch.float64 else torch.float32)


def _takes(layer: nn.Module, x: Tensor) -> bool:
    try:
        _run(_copy(layer, None, x), x, False)
    except Exception:  # another rank, say
        return False
    return True


def _differs(layer: nn.Module, made: type[ForeignBatchNorm] | None, x: Tensor) -> str | None:
    trains = not (isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized())
    for training in () if made is None else (False, True) if trains else (False,):
        twin = _copy(layer, made, x)
        expected, found = (_run(m, x, training) for m in (_copy(layer, None, x), twin))
        for name, value in expected.items():
            if name not in found or not _alike(value, found[name]):
                where = "training" if training else "evaluation"
                return (
                    f"does more than batch normalization and a function of its result: {name} differs in {where} mode"
                )
    if getattr(layer, "running_mean", None) is None or not trains:
        return None
    frozen = _copy(layer, made, x)
    frozen.source, frozen.update = "running", "never"
    before = {name: b.clone() for name, b in frozen.named_buffers()}
    expected, found = _run(_copy(layer, None, x), x, False), _run(frozen, x, True)
    moved = next((name for name, b in frozen.named_buffers() if not torch.equal(b, before[name])), None)
    if moved is not None:
        return f"changes its buffer {moved!r} beside batch normalization"
    if not _alike(expected["the output"], found["the output"]):
        return "reads whether it trains for more than the choice of statistics"
    with torch.no_grad():
        frozen.running_mean.add_(1)
    if _alike(found["the output"], _run(frozen, x, True)["the output"]):
        return "does not normalize by its running statistics"
    return None


def _copy(layer: nn.Module, made: type[ForeignBatchNorm] | None, x: Tensor) -> Any:
    """A copy without hooks, in x's dtype, its children in evaluation mode; of the made class where there is one."""
    twin: Any = copy.deepcopy(layer)
    for module in twin.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    if made is not None:
        adopt(twin, made)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    return in_mode(twin.to(x.dtype), False)


def adopt(layer: nn.Module, made: type[nn.Module]) -> None:
    """Give a layer the class that was made for it, in place."""
    state = dict(layer.__dict__)
    layer.__class__ = made
    assert isinstance(layer, ours.BatchNorm)
    layer.__setstate__(state)
    if issubclass(made, nn.SyncBatchNorm) and layer.process_group is None:
        layer.process_group = "world"


def release(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Give a layer its own class back, in place."""
    layer.__class__ = kind
    if not issubclass(kind, ours.BatchNorm):
        buffers.widen_parameters(layer)
    if issubclass(kind, nn.SyncBatchNorm) and layer.__dict__.get("process_group") == "world":
        layer.__dict__["process_group"] = None  # which is the same group there


def as_theirs(layer: ForeignBatchNorm) -> nn.Module | None:
    """A copy of a layer in evaluation mode and of its own class, or None if that computes something else."""
    if layer.normalizes_by_batch or any(not o.affine or o.parts for o in options.changed(layer)):
        return None
    twin = copy.deepcopy(layer)
    for name in (*options.DEFAULTS, *options.STATE):
        twin.__dict__.pop(name, None)
    release(twin, layer.theirs)
    return in_mode(twin, False)


def obstacle(layer: ours.BatchNorm) -> str | None:
    """Why a layer of ours, of a class with a forward of its own, does not follow its modes, or None."""
    if is_of_this_package(type(layer)):
        return None
    try:
        return _trial(layer, None)
    except Exception as error:  # whatever a forward of any class raises
        return _failure(error)


def random_like(x: Tensor) -> Tensor:
    """Normal numbers, drawn in the order of the axes: a network may give the same values in another order of memory."""
    return torch.randn_like(x, memory_format=torch.contiguous_format)


def _run(layer: Any, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Output, gradients and buffers of one call, under the same random numbers each time."""
    layer.training = training
    x = x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        y = layer(x)
        tensors = [t for t in pytree.tree_leaves(y) if isinstance(t, Tensor)]
        torch.manual_seed(1)
        loss = sum(((t * random_like(t)).sum() for t in tensors if t.requires_grad), x.new_zeros(()))
        if loss.requires_grad:
            loss.backward()
    found = {"the output": torch.cat([t.detach().double().flatten() for t in tensors] or [x.new_zeros(0)])}
    found |= {f"its buffer {name!r}": b for name, b in layer.named_buffers()}
    found |= {f"the gradient of {name!r}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    if x.grad is not None:
        found["the gradient of its input"] = x.grad
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    size = float(a.double().abs().max()) if a.numel() else 0.0
    atol = 1e-5 * max(size, 1.0)
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=atol, equal_nan=True)
