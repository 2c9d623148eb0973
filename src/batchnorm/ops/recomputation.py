"""Outputs of batch normalization that the backward makes again, instead of being kept alive by whoever reads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import MethodWrapperType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.errors import StateError
from batchnorm.kernels import cpu
from batchnorm.ops.context import is_compiled

_CHANGED = (
    "recompute_outputs: the input or the residual of a batch normalization, or the input of the convolution before it, "
    "has been modified by an inplace operation since the forward, so its output cannot be made again; modify a copy"
)


class InOneCall:
    """What an output of the C++ call was made of, which C++ keeps."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def rebuild(self) -> Tensor:
        y: Tensor | None = cpu.calls.rebuild(self._source)
        if y is None:
            raise StateError(_CHANGED)
        return y


class InPython:
    """What an output was made of: operands of `normalize`, which gives its bits once more."""

    def __init__(
        self, y: Tensor, operands: tuple[Tensor | None, ...], statistics: Any, settings: Any, mask: Any, own: bool
    ):
        self.version = y._version
        self._operands = tuple(None if t is None else t.detach() for t in operands)  # x, weight, bias
        self._versions = [None if t is None else t._version for t in operands]
        self._statistics, self._settings, self._mask, self._own = statistics, settings, mask, own

    @torch.no_grad()
    def rebuild(self) -> Tensor:
        if [None if t is None else t._version for t in self._operands] != self._versions:
            raise StateError(_CHANGED)
        x, weight, bias = self._operands
        operator = torch.ops.batchnorm.normalize.default
        settings = (*self._settings, False, self._mask, self._own)
        y: Tensor = operator(x, *self._statistics, weight, bias, None, *settings)[0]
        return y


class recompute_outputs:  # noqa: N801
    """A context in which outputs of batch normalization are not kept for the backward of what reads them.

    A convolution after BN + activation keeps its input for its own backward, and BN keeps x: two tensors of one size.
    Here the convolution keeps a note instead, and its backward makes the input again from x, mean and variance, with
    the same bits. It costs one more normalization in the backward for each reader. Run the forward of a step inside;
    the backward may be outside.

    x is not kept either if it is the output of a cheap convolution (at most 16 products an element: depthwise ones, or
    1x1 ones with few input channels) that is no smaller than that convolution's input. Then the backward makes the
    convolution again: once for the reader and the batch normalization, or for each of them if its output has more than
    half the size of the largest so far. Of two such convolutions in a row one is made again. On the CPU, through the
    C++ call (`batchnorm info` says whether it runs); under autocast, without a bias.

    It covers outputs of this package's layers and of `functional.batch_norm`, also seen through views, read by torch's
    own functions. An output with a residual is made again if the residual is itself an output of this package that is
    made again or kept: every third output along a chain of residuals is kept. Kept as ever are outputs with other
    residuals (which would have to be kept in their place), of synchronized and channel-grouped layers, modified in
    place, or read by other layers of this package (but for those that take in a depthwise convolution, see
    `accelerate`), by custom `autograd.Function`s, under autocast after a cast, under
    `torch.utils.checkpoint` and other hooks on saved tensors. If the activation is a module of its own, its output is
    kept, not that of the batch normalization: fuse it first (`accelerate`, or ``activation=``). For eager mode.

    Raises:
        StateError: in the backward, if x, the residual or the input of such a convolution was modified in place after
            the forward.

    Source: Chen et al. 2016 (recomputation); Rota Bulò et al. 2018 (of batch normalization).

    Examples:
        >>> from batchnorm import BatchNorm2d
        >>> conv, norm = torch.nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation="relu")
        >>> after = torch.nn.Conv2d(8, 8, 3)
        >>> with recompute_outputs():
        ...     loss = after(norm(conv(torch.randn(2, 3, 8, 8)))).square().mean()
        >>> loss.backward()
    """

    def __init__(self) -> None:
        self._sources: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._watches: list[_Watch | None] = []  # of each entry; None where C++ watches

    def __enter__(self) -> recompute_outputs:
        _active.modes = (*_modes(), self)
        if cpu.calls is not None:
            cpu.calls.recompute(1, _look)
        self._watches.append(_Watch().__enter__() if cpu.calls is None else None)
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.modes = _modes()[:-1]
        watch = self._watches.pop()
        if watch is None:
            cpu.calls.recompute(-1, _look)
        else:
            watch.__exit__(*exception)


class _Watch(TorchFunctionMode):
    """Looks at the nodes that each of torch's functions makes, where there is no `cpu.calls`, which does so faster."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        reads_attribute = type(function) is MethodWrapperType
        if reads_attribute or not torch.is_grad_enabled() or is_compiled():
            return result
        inputs = list(_tensors((*args, *(kwargs or {}).values())))
        if any(_source(t) is not None for t in inputs):
            seen = {t.grad_fn for t in inputs}
            nodes = [t.grad_fn for t in _tensors((result,))]
            while nodes:
                node = nodes.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    nodes.extend(before for before, _ in node.next_functions)
                    _forget_in(node)
        return result


def _look(result: Tensor) -> bool:
    """Lets the node of a result forget what can be made again; False if nodes of its kind save no tensor."""
    node = result.grad_fn
    if not is_compiled():
        _forget_in(node)
    return bool(_saved_names(node))


def _forget_in(node: Any) -> None:
    """Puts notes in place of known outputs that a new node has saved."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return
    for name in _saved_names(node):
        saved = getattr(node, f"_saved_{name}")
        if isinstance(saved, Tensor) and (source := _source(saved)) is not None:
            view = None if saved._base is None else (saved.shape, saved.stride(), saved.storage_offset())
            getattr(node, f"_raw_saved_{name}").register_hooks(_Note(source, view), _unpack)


def _source(t: Tensor) -> InPython | InOneCall | None:
    """What a tensor that requires gradients was made of, if it can be made again."""
    if not t.requires_grad:
        return None
    if cpu.calls is not None and (held := cpu.calls.source(t)) is not None:
        return InOneCall(held)
    whole = t if t._base is None else t._base
    for mode in _modes():
        source: InPython | None = mode._sources.get(whole) if mode._sources else None
        if source is not None and source.version == t._version:
            return source
    return None


class Remade(NamedTuple):
    """What making an output again takes, where a convolution is made for it.

    Attributes:
        seconds: the least of three times.
        frees_input: whether the convolution is made again because its output is not kept either.
    """

    seconds: float
    frees_input: bool


def with_convolution(y: Tensor) -> Remade | None:
    """What making an output again takes, if a convolution is made for it; else None."""
    if cpu.calls is None or not (how := cpu.calls.needs_convolution(y)) or (held := cpu.calls.source(y)) is None:
        return None
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        cpu.calls.rebuild(held)
        seconds.append(time.perf_counter() - begin)
    return Remade(min(seconds), how == 1)


class _Note:
    """Stands for a saved tensor; also the hook that puts it in its place."""

    def __init__(self, source: InPython | InOneCall, view: Any) -> None:
        self._source, self._view = source, view

    def __call__(self, _: Tensor) -> _Note:
        return self

    def unpack(self) -> Tensor:
        y = self._source.rebuild()
        return y if self._view is None else y.as_strided(*self._view)


def _unpack(note: _Note) -> Tensor:
    return note.unpack()


_active = threading.local()
_names: dict[type, tuple[str, ...]] = {}


def _modes() -> tuple[recompute_outputs, ...]:
    modes: tuple[recompute_outputs, ...] = getattr(_active, "modes", ())
    return modes


def refuse(a: Any) -> Tensor:
    """The operator by which C++ raises the error."""
    raise StateError(_CHANGED)


def is_active() -> bool:
    """Whether a context is entered, in eager mode."""
    return not is_compiled() and bool(_modes())


def note(y: Tensor, operands: tuple[Tensor | None, ...], statistics: Any, settings: Any, mask: Any, own: bool) -> None:
    """Tells the innermost context what an output was made of; by x's own statistics, or by others."""
    if y.requires_grad:
        _modes()[-1]._sources[y] = InPython(y, operands, statistics, settings, mask, own)
        if cpu.calls is not None:
            cpu.calls.known_to_python()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (each for each in value if isinstance(each, Tensor))


def _saved_names(node: Any) -> tuple[str, ...]:
    """Of the single tensors that a node of torch's own keeps."""
    kind = type(node)
    if kind not in _names:
        prefix, attributes = "_raw_saved_", set(dir(kind))
        names = (name.removeprefix(prefix) for name in attributes if name.startswith(prefix))
        _names[kind] = tuple(sorted(name for name in names if f"_saved_{name}" in attributes))
    return _names[kind]
