"""What a run's figures say, in words: wins, ties and losses alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchnorm.training.results import Calibration, Curve, InferenceTime, TrainResult

SPEED_TIE = 0.05  # two inference times this near to one another are called equal


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict; `kind` is "win", "tie" or "loss" of a comparison, "check" of a proof, or "note"."""

    kind: str
    text: str


def verdict(result: TrainResult) -> list[Finding]:
    """The findings of a run, the most important first."""
    curves = result.curves
    findings = []
    normalized, baseline = curves["batch norm"], curves.get("baseline")
    if normalized.diverged_at is not None:
        findings.append(
            Finding(
                "loss",
                f"The network with batch norm diverged: its loss was not finite at step "
                f"{normalized.diverged_at}. There is no network to fold or export; a smaller "
                "learning rate is the first thing to try.",
            )
        )
    if result.failure is not None:
        findings.append(Finding("loss", f"No network for inference: {result.failure}"))
    if result.fold_refusal is not None:
        findings.append(Finding("loss", f"Not folded, exported as it is: {result.fold_refusal}"))
    findings += [Finding("note", text) for text in result.warnings]
    if baseline is not None:
        samples = result.data["test_samples"]
        findings += _against_baseline(normalized, baseline, samples)
    if result.calibration is not None:
        findings.append(_calibration(result.calibration, result.data["test_samples"], normalized.task))
    if result.exports:
        findings.append(_exports(result))
    if result.inference_time is not None:
        findings.append(_inference(result.inference_time))
    return findings


def _against_baseline(normalized: Curve, baseline: Curve, samples: int) -> list[Finding]:
    findings = []
    if baseline.diverged_at is not None:
        findings.append(Finding("note", f"The baseline diverged at step {baseline.diverged_at}."))
    best = baseline.best
    slow, fast = baseline.first_step_at(best), normalized.first_step_at(best)
    target = f"the baseline's best {score_name(baseline.task)} ({scored(best, baseline.task)}, first at step {slow:,})"
    if fast is None:
        text = (
            f"With batch norm the network did not reach {target}: its own best is "
            f"{scored(normalized.best, normalized.task)}."
        )
        findings.append(Finding("loss", text))
    elif slow == 0:
        findings.append(Finding("tie", "The baseline was never better than before its training."))
    else:
        share = fast / slow if slow else 1.0
        kind = "win" if share < 1 else "tie" if share == 1 else "loss"
        text = f"With batch norm the network reached {target} at step {fast:,}"
        text += f", in {percent(share, 0)} of the steps." if share != 1 else ", no sooner."
        findings.append(Finding(kind, f"{text} {_in_time(normalized, baseline, fast, slow or 0)}"))
    if normalized.task == "regression":
        ours, theirs = (scored(value, "regression") for value in (normalized.best, best))
        findings.append(Finding("note", f"Best {score_name('regression')} {ours} with batch norm, {theirs} without."))
    else:
        findings.append(_best(normalized.best, best, samples))
    return findings


def _in_time(normalized: Curve, baseline: Curve, fast: int, slow: int) -> str:
    if not (normalized.steps[-1] and baseline.steps[-1]):
        return ""
    a = normalized.seconds / normalized.steps[-1]
    b = baseline.seconds / baseline.steps[-1]
    return (
        f"A step took {a * 1e3:.2f} ms with and {b * 1e3:.2f} ms without: {a * fast:.1f} s of "
        f"training against {b * slow:.1f} s."
    )


def _best(with_norm: float, without: float, samples: int) -> Finding:
    kind, chance = _compare(with_norm, without, samples)
    words = {
        "tie": f"which {samples:,} test samples cannot tell apart",
        "win": "more than chance would give",
        "loss": "a loss that chance does not explain",
    }[kind]
    return Finding(
        kind,
        f"Best test accuracy {percent(with_norm)} with batch norm, {percent(without)} without "
        f"({100 * (with_norm - without):+.1f} points; two standard errors: {100 * chance:.1f}), "
        f"{words}.",
    )


def _compare(ours: float, other: float, samples: int) -> tuple[str, float]:
    """Two accuracies over `samples` test samples: "win", "tie" or "loss", and two standard errors
    of their difference, within which it is a tie."""
    p = (ours + other) / 2
    chance = 2 * math.sqrt(2 * p * (1 - p) / samples)
    gap = ours - other
    return ("tie" if abs(gap) <= chance else "win" if gap > 0 else "loss"), chance


def _calibration(calibration: Calibration, samples: int, task: str) -> Finding:
    exact, moving = calibration.accuracy_exact, calibration.accuracy_moving
    if task == "regression":
        return Finding(
            "note",
            f"Exact population statistics in place of moving averages: {score_name(task)} {scored(exact, task)} "
            f"against {scored(moving, task)}; test loss {calibration.loss_exact:.4f} against "
            f"{calibration.loss_moving:.4f}.",
        )
    kind, _ = _compare(exact, moving, samples)
    words = {
        "tie": "a difference within chance",
        "win": "better than chance would give",
        "loss": "worse than chance would give",
    }[kind]
    return Finding(
        kind,
        f"Exact population statistics in place of moving averages: test accuracy {percent(exact)} "
        f"against {percent(moving)}, {'no difference' if exact == moving else words}; test loss "
        f"{calibration.loss_exact:.4f} against {calibration.loss_moving:.4f} nats.",
    )


def _exports(result: TrainResult) -> Finding:
    kinds = {e.status for e in result.exports}
    kind = "loss" if "failed" in kinds else "check" if kinds == {"verified"} else "note"
    return Finding(kind, exported(result))


def exported(result: TrainResult) -> str:
    """How many files for inference are proven, and how near to the unfolded network they are."""
    failed = [e.file for e in result.exports if e.status == "failed"]
    unchecked = [e.file for e in result.exports if e.status in ("not checked", "not written")]
    checked = [e for e in result.exports if e.status == "verified"]
    largest = max((e.relative_difference or 0.0 for e in checked), default=0.0)
    text = f"{len(checked)} of {len(result.exports)} exported forms were loaded again"
    text += f" and give the unfolded network's output within {largest:.1e} of its largest value." if checked else "."
    if failed:
        text += f" Failed, and not kept: {', '.join(failed)}."
    if unchecked:
        text += f" Not proven: {', '.join(unchecked)}."
    return text


def _inference(time: InferenceTime) -> Finding:
    ratio = time.speedup
    kind = "tie" if abs(ratio - 1) <= SPEED_TIE else "win" if ratio > 1 else "loss"
    words = {
        "tie": "Folding left the inference time as it was",
        "win": f"Folding made inference {ratio:.2f} times as fast",
        "loss": f"Folding made inference slower, {ratio:.2f} times as fast",
    }[kind]
    return Finding(
        kind,
        f"{words}: {time.unfolded_ms:.2f} ms before, {time.folded_ms:.2f} ms after, for a batch of "
        f"{time.batch} (medians of {time.rounds} rounds by turns).",
    )


def score_name(task: str) -> str:
    """How a network is judged."""
    return "test R²" if task == "regression" else "test accuracy"


def scored(score: float, task: str) -> str:
    """A score as it is read."""
    return f"{score:.3f}" if task == "regression" else percent(score)


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"
