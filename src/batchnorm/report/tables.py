"""The tables of a run's page, and the line above each that says what it shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from batchnorm.report.pages import as_name
from batchnorm.report.verdict import exported, percent, score_name, scored
from batchnorm.training.results import Calibration, TrainResult

MOST_CLASSES = 100
NAMES = ("layer", "fed by", "followed by")  # columns of modules' names
Cells = list[list[str]]


@dataclass(frozen=True)
class Tables:
    """The rows of each table, as text."""

    classes: Cells
    insertions: Cells
    layers: Cells
    calibration: Cells
    folds: Cells
    differences: Cells
    exports: Cells


@dataclass(frozen=True)
class Lines:
    """A sentence above each table, and "good" or "bad" where it is a verdict."""

    classes: str
    health: str
    health_kind: str
    calibration: str
    certificate: str
    certificate_kind: str
    exports: str
    exports_kind: str


def tables(result: TrainResult, layers: Iterable[dict[str, str]]) -> Tables:
    """All tables of the page; `layers` are the rows of `summary`."""
    return Tables(
        classes=_classes(result),
        insertions=[
            [
                as_name(item.layer),
                item.kind,
                str(item.num_features),
                as_name(item.after),
                "removed: the mean subtraction cancels it, beta replaces it"
                if item.bias_removed
                else "none to remove, or kept",
            ]
            for item in result.insertions
        ],
        layers=[[as_name(v) if k in NAMES else v for k, v in row.items()] for row in layers],
        calibration=_calibration(result.calibration),
        folds=_folds(result),
        differences=[
            [d.inputs, d.dtype, f"{d.absolute:.1e}", f"{d.relative:.1e}", f"{d.tolerance:.0e}"]
            for d in (result.certificate.differences if result.certificate else ())
        ],
        exports=_exports(result),
    )


def lines(result: TrainResult, layers: Iterable[dict[str, str]]) -> Lines:
    """The sentences above the tables."""
    unwell = [row["layer"] for row in layers if row["health"] != "good"]
    return Lines(
        classes=_of_classes(result),
        health="Every layer is well."
        if not unwell
        else f"Not well: {', '.join(unwell[:3])}{f' and {len(unwell) - 3} more' if len(unwell) > 3 else ''}.",
        health_kind="bad" if unwell else "good",
        calibration=_of_calibration(result.calibration, result.curves["batch norm"].task),
        certificate="" if result.certificate is None else result.certificate.verdict,
        certificate_kind="good" if result.certificate is not None and result.certificate.proven else "bad",
        exports=exported(result),
        exports_kind="good" if all(e.status == "verified" for e in result.exports) else "bad",
    )


def _classes(result: TrainResult) -> Cells:
    return [
        [
            one.label,
            f"{one.training_samples:,}",
            f"{one.test_samples:,}",
            "–" if one.accuracy is None else f"{100 * one.accuracy:.1f}",
        ]
        for one in (result.classes or ())[:MOST_CLASSES]
    ]


def _of_classes(result: TrainResult) -> str:
    tested = [one for one in result.classes or () if one.accuracy is not None]
    if not tested:
        return ""
    text = ""
    if result.base_rate is not None:
        text = f"Always answering the most frequent class is right in {percent(result.base_rate)} of the test part."
    if len(tested) > 1:
        worst, best = (pick(tested, key=lambda one: one.accuracy or 0.0) for pick in (min, max))
        text += (
            f" The finished network is right in {percent(best.accuracy or 0.0)} of class {best.label}, its best, and "
            f"in {percent(worst.accuracy or 0.0)} of class {worst.label}, its worst."
        )
    return text


def _calibration(found: Calibration | None) -> Cells:
    return [
        [
            as_name(layer.layer),
            str(layer.num_features),
            f"{layer.mean_shift:.3f}",
            f"{layer.variance_ratio_min:.3f} to {layer.variance_ratio_max:.3f}",
        ]
        for layer in (found.layers if found else ())
    ]


def _of_calibration(found: Calibration | None, task: str) -> str:
    if found is None or not found.layers:
        return ""
    layer = max(found.layers, key=lambda layer: layer.mean_shift)
    return (
        f"The largest distance of a moving mean from the exact one is {layer.mean_shift:.3f} standard deviations, in "
        f"{layer.layer}. The {score_name(task)} is {scored(found.accuracy_moving, task)} under moving averages and "
        f"{scored(found.accuracy_exact, task)} under exact statistics."
    )


def _folds(result: TrainResult) -> Cells:
    if result.certificate is None:
        return []
    folded: Cells = [
        [as_name(item.layer), Markup("folded into {}").format(as_name(item.into))] for item in result.certificate.folded
    ]
    return [*folded, *([as_name(item.layer), f"kept: {item.reason}"] for item in result.certificate.kept)]


def _exports(result: TrainResult) -> Cells:
    def small(value: float | None) -> str:
        return "–" if value is None else f"{value:.1e}"

    return [
        [
            Markup("<code>{}</code>").format(item.file),
            item.form,
            f"{item.size / 1000:,.0f}" if item.size else "–",
            small(item.max_difference),
            small(item.relative_difference),
            f"{item.status}: {item.note}" if item.note else item.status,
        ]
        for item in result.exports
    ]
