"""Batch normalization through a training: accumulation, freezing, averages of weights, calibration, the watch."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnosis.watching import Watch
from batchnorm.errors import InputError
from batchnorm.nn import batch_norm as ours
from batchnorm.nn import modes, saved_modes
from batchnorm.population.calibration import calibrate
from batchnorm.report.live import watch as start_watch
from batchnorm.surgery.conversion import convert
from batchnorm.surgery.freezing import freeze, is_frozen

_VERSION = 1


class Life:
    """What batch normalization needs at each point of a training; a context manager, made for any loop.

    The loop calls ``epoch(k)`` before an epoch, runs each optimizer step inside ``step()`` (with all its
    micro-batches), calls ``validation()`` before it validates, and leaves the context at the end.

    Args:
        net: the network that trains.
        optimizer: of the training; needed for the effective rate in the watch alone.
        batches: for calibration: an iterable that can be read again, or a function that returns one.
        forward: ``forward(net, batch)``, as of `calibrate`.
        calibrate_at_end: measure exact statistics when the context is left without an error.
        calibrate_before_validation: so many samples are measured before each validation; 0: none.
        freeze_from_epoch: all layers are frozen from this epoch on, counted from 0; None: never.
        accumulate: whether the micro-batches of one ``step()`` update the running statistics once, as one batch.
        ema: the share of its own value that a moving average of the weights keeps at each step; None: there is none.
            ``life.ema`` is the averaged network. Its statistics are those of the averaged weights once they have been
            calibrated (at the end, and before validations); without ``batches`` they are the network's own.
        watch: keyword arguments of `batchnorm.watch`, True for none; or None.

    Attributes:
        watch: the `Watch`, or None.
        ema: the averaged network, or None.

    Raises:
        InputError: calibration without batches, or a value out of range.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> data = [torch.randn(16, 4) for _ in range(4)]
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with Life(net, optimizer, batches=data, freeze_from_epoch=1, ema=0.9) as life:
        ...     for epoch in range(2):
        ...         life.epoch(epoch)
        ...         for x in data:
        ...             with life.step():
        ...                 optimizer.zero_grad()
        ...                 net(x).square().mean().backward()
        ...                 optimizer.step()
        >>> int(life.ema[1].num_batches_tracked)
        4
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        batches: Any = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        calibrate_at_end: bool = True,
        calibrate_before_validation: int = 0,
        freeze_from_epoch: int | None = None,
        accumulate: bool = True,
        ema: float | None = None,
        watch: Mapping[str, Any] | bool | None = None,
    ) -> None:
        if batches is None and calibrate_before_validation:
            raise InputError("Life: calibrate_before_validation needs batches=, to measure the statistics on")
        if calibrate_before_validation < 0 or (freeze_from_epoch is not None and freeze_from_epoch < 0):
            raise InputError("Life: calibrate_before_validation and freeze_from_epoch are numbers from 0 up")
        if ema is not None and not 0 <= ema < 1:
            raise InputError(f"Life: ema is the share that an average keeps, at least 0 and below 1; got {ema!r}")
        if not _layers(net):
            raise InputError(f"Life: {type(net).__name__} has no batch normalization")
        self.net, self.optimizer, self.batches, self.forward = net, optimizer, batches, forward
        self.calibrate_at_end = calibrate_at_end and batches is not None
        self.calibrate_before_validation = calibrate_before_validation
        self.freeze_from_epoch, self.accumulates, self.decay = freeze_from_epoch, accumulate, ema
        self._watch_options: dict[str, Any] | None = None
        if watch is not None and watch is not False:
            self._watch_options = {} if watch is True else dict(watch)
        self.watch: Watch | None = None
        self.ema: nn.Module | None = None
        self._accumulating: contextlib.ExitStack | None = None

    def __enter__(self) -> Life:
        self.begin()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.end(succeeded=kind is None)

    def begin(self) -> None:
        """The training begins."""
        if self.decay is not None:
            self.ema = copy.deepcopy(self.net).requires_grad_(False)
        if self._watch_options is not None:
            self.watch = start_watch(self.net, **{"optimizer": self.optimizer, **self._watch_options})

    def epoch(self, number: int) -> None:
        """The epoch ``number``, counted from 0, begins: layers are frozen from ``freeze_from_epoch`` on."""
        if self.freeze_from_epoch is None or number < self.freeze_from_epoch:
            return
        if not all(map(is_frozen, _layers(self.net))):
            freeze(self.net)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step with all its micro-batches is the body; on an error no statistics are updated."""
        self.step_begins()
        try:
            yield
        except BaseException:
            self.step_fails()
            raise
        self.step_ends()

    def step_begins(self) -> None:
        """The first micro-batch of an optimizer step comes."""
        if self.accumulates and self._accumulating is None and self._trains_by_batch():
            self._accumulating = contextlib.ExitStack()
            self._accumulating.enter_context(modes.accumulate(self.net))

    def step_fails(self) -> None:
        """The step is given up, and so are its statistics."""
        stack, self._accumulating = self._accumulating, None
        if stack is not None:
            with contextlib.suppress(_GivenUpError):
                stack.__exit__(_GivenUpError, _GivenUpError(), None)

    def step_ends(self, loss: Tensor | float | None = None) -> None:
        """The optimizer has made its step: statistics are committed, and the average of the weights moves."""
        stack, self._accumulating = self._accumulating, None
        if stack is not None:
            stack.close()
        if self.watch is not None:
            self.watch.step(loss)
        self._average()

    def validation(self) -> None:
        """A validation comes: statistics are measured anew, on a budget of samples."""
        if self.calibrate_before_validation:
            self._calibrate(self.calibrate_before_validation)

    def end(self, succeeded: bool = True) -> None:
        """The training is over."""
        self.step_fails()
        if self.watch is not None:
            self.watch.close()
        if succeeded and self.calibrate_at_end:
            self._calibrate(None)

    def _trains_by_batch(self) -> bool:
        return any(layer.training and not is_frozen(layer) for layer in _layers(self.net))

    def _calibrate(self, samples: int | None) -> None:
        networks = [] if all(map(is_frozen, _layers(self.net))) else [self.net]
        for net in networks if self.ema is None else [*networks, self.ema]:
            batches = self.batches() if callable(self.batches) else self.batches
            calibrate(net, batches, forward=self.forward, samples=samples)

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None or self.decay is None:
            return
        own = dict(self.net.named_parameters())
        for name, mean in self.ema.named_parameters():
            mean.lerp_(own[name].detach().to(mean.dtype), 1 - self.decay)
        buffers = dict(self.net.named_buffers())
        for name, mean_buffer in self.ema.named_buffers():
            buffer = buffers.get(name)
            if buffer is not None and mean_buffer.shape == buffer.shape:
                mean_buffer.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The modes of all layers, and the averaged network: what a checkpoint of the weights lacks."""
        state: dict[str, Any] = {"version": _VERSION, "modes": layer_modes(self.net)}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the layers in the modes of the checkpoint, and the averaged network where it was.

        Raises:
            InputError: the state is another one's.
        """
        if state.get("version") != _VERSION or not isinstance(state.get("modes"), Mapping):
            raise InputError("Life: this is no state of Life.state_dict of this version")
        set_layer_modes(self.net, state["modes"])
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])


class _GivenUpError(Exception):
    """Leaves an accumulation without a commit."""


def _layers(net: nn.Module) -> list[_BatchNorm]:
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a callback hands on to `Life` as they are, out of all that it was given."""
    own = ("net", "optimizer", "batches", "forward")
    return {name: given[name] for name in inspect.signature(Life).parameters if name not in own}


def layer_modes(net: nn.Module) -> dict[str, Any]:
    """By layer, its modes where they are not the default, as plain values for JSON: files of weights lack them."""
    layers = ((name, module) for name, module in net.named_modules() if isinstance(module, ours.BatchNorm))
    return {name: saved for name, layer in layers if (saved := saved_modes.save(layer))}


def set_layer_modes(net: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    """Put the layers in modes that `layer_modes` gave; layers of torch.nn become this package's where it must be.

    Raises:
        InputError: a name that is no batch normalization of the network.
    """
    modules = dict(net.named_modules())
    unknown = [name for name in saved if not isinstance(modules.get(name), _BatchNorm)]
    if unknown:
        raise InputError(f"set_layer_modes: {', '.join(map(repr, unknown))} is no batch normalization of this network")
    if any(not isinstance(modules[name], ours.BatchNorm) for name in saved):
        convert(net)
    for name, each in saved.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, ours.BatchNorm)
        saved_modes.load(layer, dict(each))
    return net


def warn_of_trap(trap: str, remedy: str) -> None:
    """Name a trap of a trainer that was met."""
    warnings.warn(f"batchnorm: {trap}. {remedy}", stacklevel=3)
