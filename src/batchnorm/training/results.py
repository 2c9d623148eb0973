"""What a training run found, as data; drawing and printing are in `batchnorm.report`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from batchnorm.training.config import ResolvedConfig

PERCENTILES = (15, 50, 85)  # of Figure 1 in Ioffe & Szegedy


@dataclass
class Curve:
    """What was measured of one network over its training, at the steps in `steps`.

    Args:
        steps: updates done before each measurement; 0 is the untrained network.
        train_loss: mean cross-entropy (nats) of the batches since the last measurement; None at 0.
        test_loss, test_accuracy: over the test part, in eval mode; the accuracy is a fraction.
        test_r2: of a regression, in place of the accuracy: R2 over the test part.
        task: "classification" or "regression".
        percentiles: the 15th, 50th and 85th percentile, over the test part in eval mode, of one
            unit's input to the last hidden activation.
        seconds: time spent in training steps.
        diverged_at: the step whose loss was not finite; its update was not applied.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    percentiles: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    diverged_at: int | None = None
    test_r2: list[float] = field(default_factory=list)
    task: str = "classification"

    @property
    def scores(self) -> list[float]:
        """What the network is judged by: the accuracies, or R2 of a regression."""
        return self.test_r2 if self.task == "regression" else self.test_accuracy

    @property
    def best(self) -> float:
        """The largest measured score."""
        return max(self.scores)

    @property
    def best_accuracy(self) -> float:
        """The largest measured test accuracy, a fraction."""
        return max(self.test_accuracy)

    def latest(self) -> str:
        """The latest score, for a progress bar."""
        latest = self.scores[-1]
        return f"R² {latest:.3f}" if self.task == "regression" else f"{100 * latest:.1f} %"

    def first_step_at(self, score: float) -> int | None:
        """The first measured step with at least this score, or None."""
        return next((s for s, a in zip(self.steps, self.scores, strict=True) if a >= score), None)


@dataclass(frozen=True)
class Insertion:
    """One batch norm layer that `insert` added, and the bias that it made redundant."""

    layer: str
    kind: str
    num_features: int
    after: str
    bias_removed: bool


@dataclass(frozen=True)
class LayerStatistics:
    """How far the moving averages of one layer were from the exact statistics.

    Args:
        layer: name of the layer.
        mean_shift: largest |E_moving - E_exact| / sqrt(Var_exact + eps) over the channels.
        variance_ratio_min, variance_ratio_max: of (Var_moving + eps)/(Var_exact + eps) over the
            channels. Both variances are unbiased; the moving one is within batches, "pooled" and
            "sequential" count the variance between batches too.
    """

    layer: str
    num_features: int
    mean_shift: float
    variance_ratio_min: float
    variance_ratio_max: float


@dataclass(frozen=True)
class ClassAccuracy:
    """How one class fares: its label, its samples, and which share of its test samples is right (None without any)."""

    label: str
    training_samples: int
    test_samples: int
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Moving averages against the exact population statistics, and the score under each: accuracy, or R2."""

    method: str
    batches: int
    samples: int
    layers: list[LayerStatistics]
    accuracy_moving: float
    accuracy_exact: float
    loss_moving: float
    loss_exact: float


@dataclass(frozen=True)
class Export:
    """One file of the network, and how far its output is from the unfolded network in eval mode.

    Args:
        status: "verified", "not checked" or "failed"; only a verified or unchecked file is kept.
        max_difference: largest absolute difference of a logit, None if not checked.
        relative_difference: that, divided by the largest absolute logit.
        note: why it was not checked or what failed; else how it was checked.
    """

    form: str
    file: str
    status: str
    note: str
    size: int | None = None
    max_difference: float | None = None
    relative_difference: float | None = None


@dataclass(frozen=True)
class InferenceTime:
    """Median milliseconds of a forward pass in eval mode, and the median of the rounds' ratios."""

    batch: int
    rounds: int
    unfolded_ms: float
    folded_ms: float
    speedup: float


@dataclass
class TrainResult:
    """Everything that `train` found; `to_dict` is metrics.json.

    Args:
        curves: by "batch norm" and, where it was trained, "baseline".
        skipped: layers that got no batch norm, each with the reason.
        probe: what the percentiles are of, in words.
        calibration, certificate, exports, inference_time: None or empty if the network diverged.
        network: the unfolded, calibrated, frozen network.
        failure: why there is no network for inference though the training ended, or None.
        fold_refusal: why `fold` refused the network; it is then exported unfolded.
        folded: the folded one, or None.
        example: a batch of test samples, on the CPU.
        classes: how each class fares in the finished network; empty in a regression.
        predictions: of a regression, (N, 2, K): test targets and what the finished network says; at most 2,000.
        warnings: what in network and data is likely not meant, a sentence each.
    """

    folder: Path
    config: ResolvedConfig
    environment: dict[str, str]
    data: dict[str, Any]
    insertions: list[Insertion]
    skipped: dict[str, str]
    parameters: dict[str, int]
    probe: str
    curves: dict[str, Curve]
    network: nn.Module
    example: Tensor
    calibration: Calibration | None = None
    certificate: Any = None
    failure: str | None = None
    fold_refusal: str | None = None
    folded: nn.Module | None = None
    exports: list[Export] = field(default_factory=list)
    inference_time: InferenceTime | None = None
    classes: list[ClassAccuracy] = field(default_factory=list)
    predictions: Tensor | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def base_rate(self) -> float | None:
        """The share of the most frequent class in the test part: the accuracy of a network that always answers it."""
        sizes = [one.test_samples for one in self.classes]
        return max(sizes) / sum(sizes) if sizes and sum(sizes) else None

    @property
    def diverged(self) -> bool:
        """Whether the batch-normalized network met a loss that was not finite."""
        return self.curves["batch norm"].diverged_at is not None

    @property
    def ok(self) -> bool:
        """Whether there is a network, and every form of it that was written was proven."""
        return not (self.diverged or self.failure) and all(export.status != "failed" for export in self.exports)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the networks, the example and the certificate are files of their own."""
        left_out = {"network", "folded", "example", "certificate", "folder", "config", "predictions"}
        return {
            name.name: _plain(getattr(self, name.name))
            for name in dataclasses.fields(self)
            if name.name not in left_out
        }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
