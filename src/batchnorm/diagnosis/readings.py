"""What a network gives, and what its batch-norm layers receive, in training and in evaluation on the same batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import functional
from batchnorm.batch import Batch
from batchnorm.errors import BatchNormError, InputError, message_of
from batchnorm.moments import Moments
from batchnorm.nn.batch_norm import BatchNorm as Ours
from batchnorm.pools import Pool
from batchnorm.population.feeding import sample_count
from batchnorm.population.measuring import Estimate, Measurement
from batchnorm.sources import measure
from batchnorm.surgery.comparison import random_state_kept, tensors_of
from batchnorm.undo import Attributes, Buffers, kept

Run = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]
Key = TypeVar("Key")

REFERENCE = "batch"  # what all other modes are compared with


@dataclass(frozen=True)
class Outcome:
    """What a network gives in one of its modes.

    Attributes:
        mode: ``"training"`` (each batch's own statistics, dropout), ``"batch"`` (the same without dropout, which the
            others are compared with), ``"evaluation"`` (running statistics) or ``"calibrated"`` (evaluation after
            `calibrate`).
        loss: mean over the samples, or None where it is unknown.
        accuracy: share of right classes, or None.
        agreement: share of samples with the same largest output as in ``"batch"``, or None where the output is not
            (N, C, *space).
        distance: root mean square difference from the outputs of ``"batch"``, over these outputs' standard deviation
            over the samples; infinite where an output is not finite, NaN where there is none to compare: no tensor of
            floats has the same place and shape in both.
    """

    mode: str
    loss: float | None
    accuracy: float | None
    agreement: float | None
    distance: float


@dataclass
class Place:
    """What one layer received in training at one of the places where the network uses it, by channel.

    Attributes:
        training: all its values, and within batches.
        means, variances: of each batch, the variances unbiased; one value a batch.
        samples: the means of each sample.
    """

    training: Estimate | None = None
    means: Moments | None = None
    variances: Moments | None = None
    samples: Estimate | None = None


@dataclass
class Received:
    """What one layer received, by channel.

    Attributes:
        training, evaluation: all its values in that mode, and within batches.
        places: what it received in training by the order of its calls on one batch.
        values: how many a channel of each batch has in training.
        calls: on the present batch so far.
    """

    training: Estimate | None = None
    evaluation: Estimate | None = None
    places: list[Place] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    calls: int = 0

    def next_place(self) -> Place:
        """That of the next call on the present batch."""
        self.calls += 1
        if self.calls > len(self.places):
            self.places.append(Place())
        return self.places[self.calls - 1]


@contextlib.contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """All buffers, modes and random states afterwards as before."""
    with kept(Buffers(net), Attributes(net.modules(), "training")), torch.no_grad(), random_state_kept(net):
        yield


class Readings:
    """Runs a network in its modes, batch by batch, and keeps what came in and what came out.

    Args:
        net: within `untouched`.
        layers: its batch-norm layers, by name; `batchwise`: those that keep running statistics, and that the batch's
            normalize in training.
        states: the buffers for ``"evaluation"``, and for ``"calibrated"`` where there are such.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: dict[str, _BatchNorm],
        batchwise: dict[str, _BatchNorm],
        states: dict[str, Buffers],
        run: Run,
        loss: Loss | None,
    ) -> None:
        self._net, self._layers, self._batchwise, self._states = net, layers, batchwise, states
        self._run_it, self._loss = run, loss
        self.received: dict[str, Received] = {}  # in the order of the data
        self._tallies = {mode: _Tally() for mode in ("training", REFERENCE, *states)}

    def read(self, batch: Any) -> None:
        """All modes on one batch."""
        reference = self.by_batch(batch, self._batchwise)
        self._states["evaluation"].restore()
        self._net.train()
        for received in self.received.values():
            received.calls = 0
        with self._watched(self._in_training):
            training = self._run(batch, "training")
        outputs = {"training": training, REFERENCE: reference}
        self._net.eval()
        for mode, state in self._states.items():
            state.restore()
            with self._watched(self._in_evaluation) if mode == "evaluation" else contextlib.nullcontext():
                outputs[mode] = self._run(batch, "evaluation")
        self._states["evaluation"].restore()
        for mode, output in outputs.items():
            self._tallies[mode].add(output, reference, batch, self._loss)

    def by_batch(self, batch: Any, layers: dict[str, _BatchNorm]) -> Any:
        """The output with these layers on the statistics of the batch, all else in evaluation."""
        outputs: list[Any] = []
        with Measurement(self._net, layers, "diagnose") as measurement:
            measurement.over([batch], lambda batch: outputs.append(self._run(batch, "evaluation")))
        return outputs[0]

    def effects(self, batch: Any) -> dict[str, float]:
        """How far each layer's running statistics alone move the outputs, in `Outcome.distance`'s unit."""
        reference, found = self.by_batch(batch, self._batchwise), {}
        for name in self._batchwise:
            tally = _Tally()
            others = {other: layer for other, layer in self._batchwise.items() if other != name}
            try:
                tally.add(self.by_batch(batch, others), reference, batch, None)
                if not math.isnan(tally.distance):
                    found[name] = tally.distance
            except InputError:  # what its statistics make is not finite
                found[name] = math.inf
        return found

    def outcomes(self) -> dict[str, Outcome]:
        return {mode: tally.outcome(mode) for mode, tally in self._tallies.items()}

    def _run(self, batch: Any, mode: str) -> Any:
        try:
            return self._run_it(self._net, batch)
        except BatchNormError:
            raise
        except Exception as error:
            raise InputError(
                f"diagnose: the network fails on a batch in {mode} mode: {type(error).__name__}: {message_of(error)}"
            ) from error

    @contextlib.contextmanager
    def _watched(self, take: Callable[[Received, _BatchNorm, Any, Any], None]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            return lambda layer, args, kwargs: take(self.received.setdefault(name, Received()), layer, args, kwargs)

        handles = [
            layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _in_training(received: Received, layer: _BatchNorm, args: Any, kwargs: Any) -> None:
        batch = _moments(layer, args, kwargs)
        place, estimate = received.next_place(), Estimate.of(batch)
        received.training = _merged(received.training, estimate)
        place.training = _merged(place.training, estimate)
        place.means = _one_more(place.means, batch.mean, batch.count > 0)
        place.variances = _one_more(place.variances, batch.variance(unbiased=True), batch.count > 1)
        received.values.append(int(batch.count.max()))
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and not x.is_nested and x.ndim > 1 and getattr(layer, "pool", None) is None:
            means = _means_of_samples(layer, x)
            place.samples = _merged(place.samples, Estimate.of(Moments.of(means)))

    @staticmethod
    def _in_evaluation(received: Received, layer: _BatchNorm, args: Any, kwargs: Any) -> None:
        received.evaluation = _merged(received.evaluation, Estimate.of(_moments(layer, args, kwargs)))


def _moments(layer: _BatchNorm, args: Any, kwargs: Any) -> Moments:
    if isinstance(layer, Ours):
        return layer.input_moments(*args, **kwargs)
    return functional.moments(args[0] if args else next(iter(kwargs.values())))


def _means_of_samples(layer: Any, x: Tensor) -> Tensor:
    """The mean of each sample and channel, (N, C), of samples that have valid values."""
    if getattr(layer, "_padding", None) is None or layer.channels_last or x.ndim == 2:
        return measure(Batch(x), Pool(1)).mean if x.ndim > 2 else x
    found = measure(layer._batch(x, None, None, None, None), Pool(1))
    return found.mean[found.counts[:, 0] > 0]


def _merged(before: Estimate | None, new: Estimate) -> Estimate:
    return new if before is None else before.merge(new)


def _one_more(before: Moments | None, value: Tensor, known: Tensor) -> Moments:
    """The moments over batches, with this batch's value where it has one."""
    one = Moments(known.expand_as(value).to(value), torch.where(known, value, 0.0), torch.zeros_like(value))
    return one if before is None else before + one


class _Tally:
    """Sums over batches, for an `Outcome`."""

    def __init__(self) -> None:
        self._off = self._spread = self._loss = 0.0
        self._samples = self._right = self._labels = self._same = self._places = self._compared = 0
        self._has_loss = True

    def add(self, output: Any, reference: Any, batch: Any, loss: Loss | None) -> None:
        expected = dict(tensors_of(reference))
        for path, given in tensors_of(output):
            known = expected.get(path)
            if known is None or known.shape != given.shape or not known.is_floating_point() or not known.numel():
                continue  # as the second head of a network that has one in training
            a, b = known.double(), given.double()
            self._compared += 1
            self._off += float((a - b).square().sum())
            self._spread += float((a - (a.mean(0) if len(a) > 1 else a.mean())).square().sum()) if a.ndim else 0.0
        self._add_loss(output, batch, loss)
        if _has_classes(output) and _has_classes(reference) and output.shape == reference.shape:
            same = output.argmax(1) == reference.argmax(1)
            self._same += int(same.sum())
            self._places += same.numel()

    def _add_loss(self, output: Any, batch: Any, loss: Loss | None) -> None:
        labels = _labels(output, batch)
        if labels is not None:
            self._right += int((output.argmax(1) == labels).sum())
            self._labels += labels.numel()
        if loss is None and labels is None:
            self._has_loss = False
            return
        value = F.cross_entropy(output, labels) if loss is None else loss(output, batch)  # type: ignore[arg-type]
        size = sample_count(batch)
        self._loss += float(value) * size
        self._samples += size

    @property
    def distance(self) -> float:
        if not self._compared:
            return math.nan
        if not math.isfinite(self._off):
            return math.inf
        return math.sqrt(self._off / self._spread) if self._spread else 0.0 if not self._off else math.inf

    def outcome(self, mode: str) -> Outcome:
        return Outcome(
            mode,
            self._loss / self._samples if self._has_loss and self._samples else None,
            self._right / self._labels if self._labels else None,
            self._same / self._places if self._places else None,
            self.distance,
        )


def _has_classes(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1 and output.shape[1] > 1


def _labels(output: Any, batch: Any) -> Tensor | None:
    """The class numbers of a batch ``(input, labels)``, if that is what it is."""
    if not (_has_classes(output) and isinstance(batch, (tuple, list)) and len(batch) > 1):
        return None
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    fits = labels.shape == (output.shape[0], *output.shape[2:])
    if not fits or not labels.numel() or int(labels.min()) < 0 or int(labels.max()) >= output.shape[1]:
        return None
    return labels.to(output.device).long()


def checked(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches that can be read twice."""
    if isinstance(batches, Tensor):
        return [batches]
    if isinstance(batches, Mapping):
        raise InputError("diagnose: got one dict for batches; expected an iterable, such as [dict]")
    try:
        once = iter(batches) is batches
    except TypeError as error:
        raise InputError(
            f"diagnose: got a {type(batches).__name__} for batches; expected an iterable of what the network takes"
        ) from error
    if once:
        raise InputError(
            f"diagnose: got a one-shot {type(batches).__name__}; the batches are read twice, so give a list, a "
            "DataLoader, or the like"
        )
    return batches
