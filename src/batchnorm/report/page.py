"""The self-contained page of a training run."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import batchnorm.report.plots as plots
from batchnorm.diagnosis.summary import summary
from batchnorm.report.pages import render
from batchnorm.report.tables import lines, tables
from batchnorm.report.verdict import percent, score_name, scored, verdict
from batchnorm.training.config import LEARNING_RATE
from batchnorm.training.files import REPORT
from batchnorm.training.results import TrainResult
from batchnorm.writing import write_text

_METHODS = {
    "pooled": "the moments of all batches merged, which counts the variance between batches too.",
    "ioffe": "Procedure 2, line 10, the mean of the variances within batches.",
    "sequential": "pooled, each layer under the final statistics of those before it.",
}


@dataclass(frozen=True)
class Tile:
    """A figure that is worth reading first; `kind` names its colour."""

    label: str
    value: str
    note: str
    kind: str = ""


def write_report(result: TrainResult, folder: str | Path) -> Path:
    """Write report.html, and the drawings as plots/*.svg and *.png, into `folder`.

    The page needs no other file and no network: styles and drawings are inside it. Without
    matplotlib it has the tables alone, and says so.

    Returns:
        The path of report.html.
    """
    folder = Path(folder)
    drawn = plots.draw(result, folder / "plots") if plots.available() else []
    config, data = result.config, result.data
    rows = summary(result.network, result.example).rows()
    page = render(
        "report",
        title=f"Batch norm in {_name(config.network)} on {_name(config.data)}",
        subtitle=(
            f"{config.steps:,} training steps of {config.batch_size} samples, "
            f"{config.optimizer.upper() if config.optimizer == 'sgd' else 'Adam'}, "
            f"learning rate {config.lr:g}, seed {config.seed}. Procedure 2 of Ioffe & Szegedy "
            "(2015): insert, train, calibrate, freeze, fold, verify, export."
        ),
        tiles=_tiles(result),
        findings=verdict(result),
        plots={plot.name: plot for plot in drawn},
        fairness=_fairness(result),
        result=result,
        config=config,
        data=data,
        layers=rows,
        tables=tables(result, rows),
        lines=lines(result, rows),
        captions=_captions(result),
        score_name=score_name(result.curves["batch norm"].task),
        scored=scored,
        task=result.curves["batch norm"].task,
        method_note=_METHODS[config.method],
        certificate=result.certificate,
        input_note="; ".join(str(note) for note in data["notes"][-1:]).rstrip("."),
        settings=_settings(result),
        surroundings=[*result.environment.items(), ("data, SHA-256", str(data["sha256"])[:16])],
        command=command(result),
    )
    write_text(folder / REPORT, page)
    return folder / REPORT


def _captions(result: TrainResult) -> dict[str, str]:
    score = score_name(result.curves["batch norm"].task)
    accuracy = f"{score[0].upper()}{score[1:]} in eval mode, that is under the moving averages, every "
    accuracy += f"{result.config.eval_every:,} steps."
    if "baseline" in result.curves:
        accuracy += " The dotted line is the best that the baseline reached; the dots mark where each network first "
        accuracy += "reached it."
    return {
        "accuracy": accuracy,
        "loss": "Training: mean loss of the batches since the last measurement (with batch norm: under batch "
        f"statistics). Test: loss of the {result.data['test_samples']:,} test samples in eval mode.",
        "percentiles": f"15th, 50th and 85th percentile over the test samples of {result.probe}. Ioffe & Szegedy "
        "(2015) draw the same in their Figure 1 (b, c). It shows how steady the distribution is. That this steadiness "
        "is why batch norm helps is the hypothesis of 2015; later work (Santurkar et al., 2018) finds a smoother loss "
        "the better supported account.",
        "exports": f"Each file was loaded again and run on {len(result.example)} test samples, and compared with the "
        "unfolded network in eval mode. Accepted up to 1e-5 of the largest output.",
    }


def _tiles(result: TrainResult) -> list[Tile]:
    tiles = []
    normalized, baseline = result.curves["batch norm"], result.curves.get("baseline")
    if baseline is not None and normalized.diverged_at is None:
        best = baseline.best
        fast, slow = normalized.first_step_at(best), baseline.first_step_at(best)
        if fast is not None and slow:
            tiles.append(
                Tile(
                    "steps to baseline’s best",
                    percent(fast / slow, 0),
                    f"{fast:,} instead of {slow:,} steps",
                    "batch-norm",
                )
            )
    tiles.append(
        Tile(
            f"best {score_name(normalized.task)}",
            scored(normalized.best, normalized.task),
            "with batch norm" + (f"; {scored(baseline.best, normalized.task)} without" if baseline is not None else ""),
            "batch-norm",
        )
    )
    checked = [e.relative_difference for e in result.exports if e.status == "verified"]
    if checked:
        tiles.append(
            Tile(
                "largest error of an export",
                f"{max(value or 0.0 for value in checked):.0e}",
                f"of the largest output, {len(checked)} of {len(result.exports)} forms proven",
            )
        )
    if result.inference_time is not None:
        tiles.append(Tile("inference after folding", f"{result.inference_time.speedup:.2f} ×", "as fast"))
    return tiles


def _fairness(result: TrainResult) -> str:
    config = result.config
    text = "Best accuracies are picked on the test part itself, so they flatter every curve a little. "
    if "baseline" in result.curves:
        text = "Both start from the same weights and see the same batches. " + text
        if config.lr == config.baseline_lr:
            text += (
                f"Both use the learning rate {config.lr:g}; it was not tuned for either, and a "
                "baseline at a rate of its own may do better (--baseline-lr). "
            )
        else:
            text += f"Learning rates: {config.lr:g} with batch norm, {config.baseline_lr:g} without. "
    if (config.network, config.data) == ("figure1", "mnist5k") and (
        config.lr == config.baseline_lr == LEARNING_RATE and "baseline" in result.curves
    ):
        text += (
            "On these digits it does: at rates near 1, in 6,000 steps (one seed), it came to about "
            "94 %, batch norm to about 95 %, and the lead in steps was smaller. "
        )
    if config.network == "figure1":
        text += (
            "The paper trains this network on all of MNIST for 50,000 steps of 60 samples; it "
            "states neither learning rate nor initial spread, so these are ours (Glorot’s spread)."
        )
    return text


def _settings(result: TrainResult) -> list[tuple[str, str]]:
    config, data = result.config, result.data
    shape = " × ".join(map(str, data["input_shape"]))
    return [
        ("network", config.network),
        ("data", config.data),
        (
            "samples",
            f"{data['training_samples']:,} for training, {data['test_samples']:,} for the test",
        ),
        ("a sample", f"{shape}, {data['num_classes']} classes"),
        ("treatment", " ".join(data["notes"])),
        ("optimizer", f"{config.optimizer}, momentum {config.momentum:g}"),
        ("learning rate", f"{config.lr:g}, constant"),
        ("weight decay", f"{config.weight_decay:g}, on weights only"),
        ("batch", f"{config.batch_size} samples"),
        ("placement", config.placement.replace("_", " ")),
        ("seed", str(config.seed)),
    ]


def command(result: TrainResult) -> str:
    """The command line that repeats the run, every setting spelled out."""
    words = ["batchnorm", "train"]
    for name, value in result.config.to_dict().items():
        option = "--" + name.replace("_", "-")
        if name == "arguments":
            for argument, given in (result.config.arguments or {}).items():
                words += ["--set", f"{argument}={given if isinstance(given, str) else json.dumps(given)}"]
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        elif value is not None:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _name(spec: str) -> str:
    return {
        "figure1": "the Figure 1 network",
        "convnet": "a small convnet",
        "mnist5k": "MNIST 5k",
    }.get(spec, spec)
