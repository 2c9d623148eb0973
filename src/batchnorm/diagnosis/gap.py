"""Why a network is worse in evaluation than in training, and what mends it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.diagnosis.findings import Finding, LayerGap, Statistics, compare, findings
from batchnorm.diagnosis.readings import REFERENCE, Outcome, Readings, checked, untouched
from batchnorm.diagnosis.tables import finite, text_table
from batchnorm.errors import InputError
from batchnorm.ops.context import eager
from batchnorm.population.calibration import calibrate
from batchnorm.population.feeding import Lengths, feed, progress_bar, with_lengths
from batchnorm.population.measuring import buffers_of
from batchnorm.surgery.folding import uses_batch_statistics
from batchnorm.surgery.modules import unwrap
from batchnorm.undo import Buffers

CLOSE = 0.05  # in standard deviations of the outputs
_LARGE = 1e4  # numbers above have an exponent
_AWAY = "standard deviations from those with the batches' own statistics"
_MODES = {
    "training": "training",
    REFERENCE: "training without dropout",
    "evaluation": "evaluation",
    "calibrated": "evaluation, calibrated",
}


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        outcomes: by mode: ``"training"``, ``"batch"``, ``"evaluation"`` and, where a layer keeps running statistics,
            ``"calibrated"``.
        layers: the batch normalization layers in the order of the data.
        findings: the gravest first; empty where nothing is the matter.
        batches: how many were read.
    """

    outcomes: dict[str, Outcome]
    layers: tuple[LayerGap, ...]
    findings: tuple[Finding, ...]
    batches: int

    @property
    def before(self) -> Outcome:
        """Evaluation as it is."""
        return self.outcomes["evaluation"]

    @property
    def after(self) -> Outcome | None:
        """Evaluation after `calibrate` on the batches, or None where no layer keeps running statistics."""
        return self.outcomes.get("calibrated")

    @property
    def follows(self) -> bool | None:
        """Whether evaluation follows training as closely as exact statistics would.

        None without running statistics, or without outputs to compare.
        """
        if self.after is None or math.isnan(self.before.distance):
            return None
        before = self.before.distance
        return math.isfinite(before) and (before <= CLOSE or self.after.distance > 0.9 * before)

    @property
    def verdict(self) -> str:
        """One or two sentences: whether evaluation follows training, and whether `calibrate` mends it."""
        before, after = self.before.distance, None if self.after is None else self.after.distance
        if after is None:
            return "No layer keeps running statistics: evaluation depends on the batch, as training does."
        if math.isnan(before):
            return (
                "Outputs cannot be compared: no tensor of floats has the same place and shape in evaluation as with "
                "the batches' own statistics. The layers below are measured all the same."
            )
        if not math.isfinite(before):
            return f"Evaluation is broken: its outputs are not finite. Calibrated, they are {_size(after)} {_AWAY}."
        figures = f"its outputs are {_size(before)} {_AWAY}, calibrated {_size(after)}."
        if before <= CLOSE:
            return f"Evaluation follows training: {figures}"
        if self.follows:
            return (
                f"Evaluation follows training as closely as exact statistics would: {figures} The rest is the noise of "
                "single batches."
            )
        part = "the reason" if after <= before / 2 else "part of the reason"
        return f"Evaluation does not follow training, and running statistics are {part}: {figures}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: what is not finite is None."""
        return {**finite(dataclasses.asdict(self)), "verdict": self.verdict}

    def outcome_rows(self) -> list[dict[str, str]]:
        """One row a mode: column title to text; columns of which nothing is known are left out."""
        rows = [
            {
                "": _MODES[mode],
                "loss": _text(outcome.loss, "{:.4f}"),
                "accuracy": _percent(outcome.accuracy),
                "same prediction": _percent(outcome.agreement),
                "distance of outputs": _text(None if math.isnan(outcome.distance) else outcome.distance, "{:.3f}"),
            }
            for mode, outcome in self.outcomes.items()
        ]
        return [{title: text for title, text in row.items() if any(r[title] for r in rows)} for row in rows]

    def layer_rows(self) -> list[dict[str, str]]:
        """One row a layer."""
        return [
            {
                "layer": layer.name or "(the network)",
                "values": f"{layer.values_per_channel:,}",
                "mean off by": _text(layer.mean_off, "{:.3f}"),
                "std off by": _text(layer.std_off, "{:.3f}"),
                "arriving: mean": _text(layer.arrives_mean_off, "{:.3f}"),
                "std": _text(layer.arrives_std_off, "{:.3f}"),
                "batch noise": _text(layer.noise, "{:.3f}"),
                "moves outputs by": _text(layer.effect, "{:.3f}"),
                "cause": (layer.cause or "-").replace("_", " "),
            }
            for layer in self.layers
        ]

    def __str__(self) -> str:
        tables = ("\n".join(text_table(rows)) for rows in (self.outcome_rows(), self.layer_rows()))
        parts = [self.verdict, *tables]
        parts += [
            f"{finding.kind.replace('_', ' ')}: {finding.text}\n  -> {finding.repair}" for finding in self.findings
        ]
        return "\n\n".join(parts)


def diagnose(
    net: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    progress: bool = False,
    lengths: Lengths | None = None,
) -> Diagnosis:
    """Measure how far evaluation is from training, find out why, and try the repair.

    On the same batches the network is run as in training, as in training without dropout, in evaluation, and in
    evaluation after `calibrate`; each layer's running statistics are compared with the data's, and with what each cause
    predicts. ``net`` is afterwards as it was, bit for bit: the repair is tried, not kept. Training is what
    ``net.train()`` makes it: layers of `freeze` stay frozen, and have no gap; those that your loop sets to ``.eval()``
    do not.

    Cost: five forward passes over the batches, and one for each layer over the first batch. A few dozen batches tell.

    Args:
        net: any network with batch normalization, torch's or this package's.
        batches: batches as in training (their size and order matter), which can be read twice: a tensor, a list, a
            DataLoader. Labels of ``(input, labels)`` give loss and accuracy where the output is (N, C, *space).
        forward: ``forward(net, batch)``; by default a tuple feeds its first element, a dict what the network takes.
        loss: ``loss(output, batch)``, the mean over the batch; by default the cross entropy with the labels.
        progress: show a progress bar on standard error.
        lengths: where a batch has the valid lengths of its sequences, as for `calibrate`.

    Returns:
        `Diagnosis`: outcomes before and after, a row a layer, findings with repairs. ``print`` shows all of it.

    Raises:
        InputError: no batch normalization, no batches, batches that cannot be read twice, a network that fails on them
            in one of the modes, or an input of a layer that is not finite (named by layer and batch).

    Source: this package; Ioffe & Szegedy 2015, section 3.1 (statistics of inference), Kullback & Leibler 1951 (the
    distance of a layer's statistics).

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = diagnose(net, [torch.randn(64, 4) + 3 for _ in range(4)])
        >>> found.findings[0].kind, found.findings[0].repair
        ('untrained', 'bn.calibrate(net, batches)')
    """
    root = unwrap(net, "diagnose")
    layers = {name: module for name, module in root.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        raise InputError(f"diagnose: {type(root).__name__} has no batch normalization; bn.insert puts it in")
    kept = {name: m for name, m in layers.items() if m.track_running_stats and m.running_mean is not None}
    batches, run = checked(batches), with_lengths(forward or feed, lengths)
    with untouched(root), eager():
        root.train()
        batchwise = {name: layer for name, layer in kept.items() if uses_batch_statistics(layer)}
        frozen = [layer for name, layer in kept.items() if name not in batchwise]
        states, before, exact = _states(root, kept, frozen, batches, run, progress)
        readings, count, effects = Readings(root, layers, batchwise, states, run, loss), 0, {}
        with progress_bar("compare", progress, batches) as advance:
            for batch in batches:
                readings.read(batch)
                if not count:
                    effects = readings.effects(batch)
                count += 1
                advance(1)
        if not count:
            raise InputError("diagnose: got no batches; expected at least one")
        reached = {name: seen for name, seen in readings.received.items() if seen.training is not None}
        if not reached:
            raise InputError("diagnose: the batches reached no batch-norm layer of the network")
        root.eval()
        rows = [
            compare(
                name, layers[name], before.get(name), exact.get(name), seen, effects.get(name), layers[name] in frozen
            )
            for name, seen in reached.items()
        ]
    return Diagnosis(readings.outcomes(), tuple(rows), findings(rows, count, root), count)


def _states(
    net: nn.Module,
    kept: dict[str, _BatchNorm],
    frozen: list[_BatchNorm],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    progress: bool,
) -> tuple[dict[str, Buffers], dict[str, Statistics], dict[str, Statistics]]:
    """The buffers before and after `calibrate` (frozen layers' the same), and the statistics of both times by layer."""
    own = [Buffers(layer) for layer in frozen]
    states, before = {"evaluation": Buffers(net)}, _statistics(kept)
    if not kept:
        return states, {}, {}
    with warnings.catch_warnings(), _without_new_statistics(net):
        warnings.filterwarnings("ignore", "calibrate: layers")  # that run in training alone, or keep nothing
        calibrate(net, batches, forward=run, progress=progress)
    exact = _statistics(kept)
    for buffers in own:
        buffers.restore()
    return {**states, "calibrated": Buffers(net)}, before, exact


@contextlib.contextmanager
def _without_new_statistics(net: nn.Module) -> Iterator[None]:
    """Within it `calibrate` gives no layer running statistics that has none."""
    asking = [
        m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is None and m.track_running_stats
    ]
    try:
        for layer in asking:
            layer.track_running_stats = False
        yield
    finally:
        for layer in asking:
            layer.track_running_stats = True


def _statistics(layers: dict[str, _BatchNorm]) -> dict[str, Statistics]:
    return {
        name: Statistics(*(buffer.detach().to(torch.float64, copy=True) for buffer in buffers_of(layer)))
        for name, layer in layers.items()
    }


def _text(value: float | None, pattern: str) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2e}" if abs(value) >= _LARGE else pattern.format(value)


def _size(value: float) -> str:
    return f"{value:.2f}" if value < _LARGE else f"{value:.2e}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
