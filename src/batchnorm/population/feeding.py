"""How batches reach a network: what it is fed of each, how many are read, and how far that has come."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.errors import InputError
from batchnorm.nn.padding import mask_padding
from batchnorm.progress import counting_bar


def read_batches(batches: Iterable[Any], samples: int | None, advance: Callable[[int], None]) -> Iterator[Any]:
    """One pass over the batches, up to the number of samples."""
    seen = 0
    for batch in batches:
        yield batch
        size = 1 if samples is None else sample_count(batch)
        advance(size)
        seen += size
        if samples is not None and seen >= samples:
            return


def sample_count(batch: Any) -> int:
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    for leaf in leaves:
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise InputError(
        f"got samples=, and a batch of type {type(batch).__name__} without a tensor to "
        "count its samples by; leave samples out, or cut the batches yourself"
    )


def feed(net: nn.Module, batch: Any) -> Any:
    """Run the network on the inputs of a batch, and ignore its labels."""
    device = next(chain(net.parameters(), net.buffers())).device

    def to_device(leaf: Any) -> Any:
        movable = isinstance(leaf, (Tensor, PackedSequence))
        return leaf.to(device) if movable else leaf

    if isinstance(batch, Mapping):
        return net(**tree_map(to_device, _named_inputs(net, batch)))
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        if not batch:
            raise InputError(f"got an empty {type(batch).__name__} for a batch")
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
            f"got a batch with the keys {list(batch)}, none of which the network's "
            f"forward takes ({sorted(taken)}); pass forward=lambda net, batch: ..."
        )
    return inputs


@contextlib.contextmanager
def progress_bar(
    title: str, show: bool, batches: Iterable[Any], samples: int | None = None
) -> Iterator[Callable[[int], None]]:
    """A function to call with the batches done, or with the samples where their number is given."""
    if not show:
        yield lambda done: None
        return
    total = samples or (len(batches) if isinstance(batches, Sized) else None)
    with counting_bar(title, "samples" if samples else "batches", total) as advance:
        yield advance


Lengths = Callable[[Any], Tensor] | str | int
"""Where a batch has the lengths of its sequences: under a key, at a place, or by a function."""


def with_lengths(run: Callable[[Any, Any], Any], lengths: Lengths | None) -> Callable[[Any, Any], Any]:
    """The same run of a network on a batch, in which normalizations know the batch's lengths."""
    if lengths is None:
        return run
    if isinstance(lengths, bool) or not (callable(lengths) or isinstance(lengths, (str, int))):
        raise InputError(
            f"lengths must tell where a batch has its lengths: a key, a place in a tuple, or a function of the batch; "
            f"got {lengths!r}"
        )
    return lambda net, batch: _run_padded(run, net, batch, lengths)


def _run_padded(run: Callable[[Any, Any], Any], net: Any, batch: Any, lengths: Lengths) -> Any:
    if callable(lengths):
        valid = lengths(batch)
    else:
        try:
            valid = batch[lengths]
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"got lengths={lengths!r}, and a batch of type {type(batch).__name__} that has nothing there"
            ) from None
    with mask_padding(net, valid):
        return run(net, batch)
