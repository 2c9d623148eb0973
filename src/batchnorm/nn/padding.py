"""Valid lengths, or a mask, for every batch normalization inside a network whose forward does not hand them on.

A network takes padded sequences and gives its normalizations x alone. `mask_padding` tells them from outside which
frames are valid. A layer knows these for its own input by the size of the time axis there: strides and subsampling make
that smaller in a known ratio, or by a rule that is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from batchnorm.errors import InputError
from batchnorm.nn import modes, recurrent
from batchnorm.nn.step_batch_norm import StepBatchNorm
from batchnorm.ops.context import eager, is_recomputing

if TYPE_CHECKING:
    from batchnorm.nn.batch_norm import BatchNorm

Rule = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def mask_padding(
    net: nn.Module,
    lengths: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    size: int | None = None,
    time_axis: int = -1,
    rules: Mapping[str | nn.Module, Rule] | None = None,
) -> Iterator[None]:
    """Within it every batch normalization of ``net`` knows which frames of its input are padding.

    Padded frames reach neither statistics nor gradients, and are 0 behind the normalization, as with ``lengths=`` of a
    layer's own ``forward``. If a layer's input has t frames and the network's input has T, frame j is valid if frame
    floor(j T / t) of the network's input is: of a length n these are the first ``ceil(n t / T)``. So lengths follow
    strides and subsampling. Layers that the network gives a mask or lengths itself keep those.

    Layers of torch.nn, subclasses of them and ``SyncBatchNorm`` become this package's for the time, as in `mode`. This
    package's `LSTM`, `GRU` and `RNN` read the lengths in their whole recurrence. Compiled networks run eagerly. If
    activations are checkpointed, call ``backward`` inside, too.

    Args:
        net: a network or a part of one, with batch normalization.
        lengths: integers (N,), the valid frames of each sample of the network's input.
        mask: in place of lengths: boolean (N, T), True = valid.
        size: T, the frames that lengths count. By default it is read off the network's inputs: the axis, beside that
            of the N samples, that has room for the longest. If several have, it is the one that the first layer's input
            has, too.
        time_axis: which axis of space is time in the input of a layer, beside N and C: -1 is the last, as in (N, C, T)
            and (N, C, F, T), 0 the first, as in (N, C, T, F). Layers with ``pool=`` know theirs.
        rules: by module of the network, or its name: a function that gives the lengths (N,) behind that module from
            those before it; for a normalization, those of its own input. They go with ``lengths``.

    Returns:
        A context manager.

    Raises:
        InputError: lengths and mask, or none of the two; a layer that cannot take a mask, by name; sizes that do not
            fit, or that leave open which axis is time.

    Source: Laurent et al. 2016, Batch normalized recurrent neural networks, section 3 (statistics of valid frames).

    Examples:
        >>> net = nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.BatchNorm1d(4))
        >>> with mask_padding(net, torch.tensor([9, 4])):
        ...     y = net(torch.randn(2, 2, 9))
        >>> y.shape, int(y[1].abs().sum(0).count_nonzero())  # of 5 frames, ceil(4 * 5 / 9) are valid
        (torch.Size([2, 4, 5]), 3)
    """
    modes.check(net, "mask_padding")
    names = {id(module): name for name, module in net.named_modules()}
    padding = _Padding(*_checked(lengths, mask, size), time_axis, _by_id(net, rules or {}, lengths), names)
    with eager(), modes.mode(net):
        layers = _layers(net)
        before = [layer.__dict__.get("_padding") for layer in layers]
        handles = padding.watch(net, layers)
        try:
            for layer in layers:
                layer._padding = padding
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, own in zip(layers, before, strict=True):
                layer._padding = own
                if own is None:
                    layer.__dict__.pop("_padding", None)


def _checked(lengths: Any, mask: Any, size: int | None) -> tuple[Tensor | None, Tensor | None, int | None]:
    """Lengths, mask and size that fit together."""
    if (lengths is None) == (mask is None):
        given = "neither" if mask is None else "both"
        raise InputError(f"mask_padding: expected lengths (N,) or a mask (N, T), got {given}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.ndim != 2:
            raise InputError("mask_padding: mask must be a boolean tensor (N, T), True = valid")
        if size not in (None, mask.shape[1]):
            raise InputError(f"mask_padding: got size={size}, and a mask of {mask.shape[1]} frames")
        return None, mask, mask.shape[1]
    lengths = torch.as_tensor(lengths)
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
        raise InputError(f"mask_padding: lengths must be integers (N,), got {lengths.dtype} {tuple(lengths.shape)}")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"mask_padding: size must be a number of frames, got {size!r}")
    lengths = lengths.detach().long()
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= (size or int(lengths.max())):
        at_most = "" if size is None else f" and at most size={size}"
        raise InputError(f"mask_padding: lengths must not be negative{at_most}, got {lengths.tolist()}")
    return lengths, None, size


def _by_id(net: nn.Module, rules: Mapping[str | nn.Module, Rule], lengths: Tensor | None) -> dict[int, Rule]:
    """The rules by the identity of their modules."""
    if rules and lengths is None:
        raise InputError("mask_padding: rules say how lengths change; give lengths, and no mask")
    modules = dict(net.named_modules())
    known = {id(module) for module in modules.values()}
    found = {}
    for key, rule in rules.items():
        module = modules.get(key) if isinstance(key, str) else key
        if module is None or id(module) not in known:
            raise InputError(f"mask_padding: rules has {key!r}, which is no module of the network")
        if not callable(rule):
            raise InputError(f"mask_padding: the rule of {key!r} must be a function of lengths, got {rule!r}")
        found[id(module)] = rule
    return found


def _layers(net: nn.Module) -> list[Any]:
    """What takes the padding: normalizations, and recurrences in place of those inside them."""
    inside: set[int] = set()
    found: list[Any] = []
    for name, module in net.named_modules():
        if isinstance(module, recurrent._Normalized) and module.options.batch_norm is not None:
            inside.update(map(id, module.modules()))
            if not isinstance(module, nn.RNNBase):
                raise InputError(
                    f"mask_padding: '{name}' is a {type(module).__name__}, which takes one step at a time and no "
                    "padding; use the layer of sequences, or leave out what is over"
                )
            found.append(module)
        elif isinstance(module, _BatchNorm) and id(module) not in inside and not isinstance(module, StepBatchNorm):
            found.append(module)
    return found


@dataclass
class _Reference:
    """Lengths of all samples at one place of the network, and how many frames there are with padding.

    ``sizes`` has all that this number can be: one, several until a layer tells, or none.
    """

    lengths: Tensor | None
    mask: Tensor | None
    sizes: tuple[int, ...]
    masks: dict[int, Tensor] = field(default_factory=dict)

    def at(self, frames: int, device: torch.device) -> Tensor:
        """The mask (N, frames) of an input with so many."""
        if frames not in self.masks:
            size, j = self.sizes[0], torch.arange(frames, device=device)
            if self.mask is not None:
                self.masks[frames] = self.mask.to(device)[:, j * size // max(frames, 1)]
            else:
                assert self.lengths is not None
                self.masks[frames] = j * size < self.lengths.to(device)[:, None] * frames
        return self.masks[frames]


class _Padding:
    """The valid frames of a network's input, for layers to ask."""

    def __init__(
        self,
        lengths: Tensor | None,
        mask: Tensor | None,
        size: int | None,
        time_axis: int,
        rules: dict[int, Rule],
        names: dict[int, str],
    ) -> None:
        self.time_axis, self.rules, self.names = time_axis, rules, names
        given = mask if lengths is None else lengths
        assert given is not None
        self.samples = len(given)
        self.longest = int(lengths.max()) if lengths is not None and lengths.numel() else 0
        self.first = _Reference(lengths, mask, () if size is None else (size,))
        self.references = [self.first]
        self.used: dict[tuple[int, int], _Reference] = {}  # by layer and frames, for a recomputation
        self.depth = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Padding:
        return self  # of the forward that runs, whose modules it knows

    def watch(self, net: nn.Module, layers: list[Any]) -> list[Any]:
        """Hooks that see where a forward begins, and where lengths change by a rule."""
        wanted = set(map(id, layers))
        handles = []
        for module in net.modules():
            if any(id(inner) in wanted for inner in module.modules()):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            if id(module) in self.rules and id(module) not in wanted:
                handles.append(module.register_forward_hook(self._change))
        return handles

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if is_recomputing():
            return
        if not self.depth:
            self.references = [_Reference(self.first.lengths, self.first.mask, self.first.sizes)]
            if not self.first.sizes:
                self.references[0].sizes = self._sizes((args, kwargs))
        self.depth += 1

    def _leave(self, *_: Any) -> None:
        if not is_recomputing():
            self.depth -= 1

    def _sizes(self, inputs: Any) -> tuple[int, ...]:
        """The sizes that the time axis of these inputs may have."""
        found: set[int] = set()
        for leaf in tree_leaves(inputs):
            shape = list(leaf.shape) if isinstance(leaf, Tensor) and not leaf.is_nested else []
            if len(shape) > 1 and self.samples in shape[:2]:
                shape.remove(self.samples)
                found.update(size for size in shape if size >= max(self.longest, 1))
        return tuple(sorted(found))

    def _change(self, module: nn.Module, args: Any, output: Any) -> None:
        """A new reference behind a module that has a rule."""
        if not is_recomputing():
            self.references.append(self._ruled(self.references[-1], module))

    def _ruled(self, before: _Reference, module: nn.Module) -> _Reference:
        rule, lengths = self.rules[id(module)], before.lengths
        assert lengths is not None
        after = torch.as_tensor(rule(lengths.clone())).clamp(min=0)
        if after.shape != lengths.shape or after.is_floating_point():
            raise InputError(
                f"mask_padding: the rule of '{self.names.get(id(module), '')}' made {after.dtype} {tuple(after.shape)} "
                f"of lengths {tuple(lengths.shape)}; expected as many integers"
            )
        sizes = tuple(int(torch.as_tensor(rule(lengths.new_tensor([size])))[0]) for size in before.sizes)
        return _Reference(after, None, sizes)

    def mask_of(self, layer: Any, x: Any) -> Tensor | None:
        """The valid frames of a layer's input: (N, frames), or as its ``mask=`` wants it; None where all are.

        Args:
            layer: a normalization, or a recurrence.
            x: its input. A packed sequence or nested tensor, which knows its own lengths, is taken whole, and so is an
                input without an axis of time.
        """
        if not isinstance(x, Tensor) or x.is_nested or not self.samples:
            return None
        batch, axis = self._axes(layer, x)
        if x.ndim > batch and x.shape[batch] != self.samples:
            given = "lengths" if self.first.mask is None else "rows of the mask"
            raise InputError(
                f"mask_padding: {self._called(layer)} got an input {tuple(x.shape)} with {x.shape[batch]} samples on "
                f"axis {batch}, and there are {self.samples} {given}. Give the part of the network that has these"
            )
        if axis is None:
            return None
        valid = self._reference(layer, x.shape[axis]).at(x.shape[axis], x.device)
        if isinstance(layer, nn.RNNBase):
            return valid
        if batch:
            return valid.t()
        if layer.channels_last:
            return valid.reshape(len(valid), *(x.shape[axis] if a == axis else 1 for a in range(1, x.ndim - 1)))
        return valid.reshape(len(valid), *(x.shape[axis] if a == axis else 1 for a in range(2, x.ndim)))

    def _axes(self, layer: Any, x: Tensor) -> tuple[int, int | None]:
        """The axis of samples, and that of time where there is one."""
        if isinstance(layer, nn.RNNBase) or layer.pool is not None:
            if x.ndim != 3:
                return 0 if layer.batch_first else 1, None
            return (0, 1) if layer.batch_first else (1, 0)
        space = range(1, x.ndim - 1) if layer.channels_last else range(2, x.ndim)
        if not space:
            return 0, None
        if not -len(space) <= self.time_axis < len(space):
            raise InputError(
                f"mask_padding: time_axis={self.time_axis} is none of the {len(space)} axes of space that the input "
                f"{tuple(x.shape)} of {self._called(layer)} has"
            )
        return 0, space[self.time_axis]

    def _reference(self, layer: Any, frames: int) -> _Reference:
        """What lengths count where this layer stands: the last place of as many frames, or else the last place."""
        if is_recomputing() and (id(layer), frames) in self.used:
            return self.used[id(layer), frames]
        found = next((r for r in reversed(self.references) if frames in r.sizes), self.references[-1])
        if len(found.sizes) > 1 and frames in found.sizes:
            found.sizes = (frames,)
        if len(found.sizes) != 1:
            sizes = ", ".join(map(str, found.sizes)) or "none"
            raise InputError(
                f"mask_padding: which axis of the network's input is time? Of its sizes {sizes} can hold a length of "
                f"{self.longest}, and {self._called(layer)} has {frames} frames. Give size=, the number of frames with "
                "padding"
            )
        if id(layer) in self.rules:
            ruled = self._ruled(found, layer)
            ruled.sizes = (frames,)
            assert ruled.lengths is not None
            if ruled.lengths.numel() and int(ruled.lengths.max()) > frames:
                raise InputError(
                    f"mask_padding: the rule of {self._called(layer)} gives lengths {ruled.lengths.tolist()}, more "
                    f"than the {frames} frames of its input"
                )
            self.references.append(ruled)
            found = ruled
        self.used[id(layer), frames] = found
        return found

    def _called(self, layer: BatchNorm) -> str:
        return f"layer '{self.names.get(id(layer), '')}'"
