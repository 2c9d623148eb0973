"""docs/lab-results.md, docs/lab-gallery.html and docs/images/lab/, out of a run of the lab.

    python docs/scripts/lab_gallery.py runs/lab --quick

runs what is missing of five seeds of every experiment in that folder, and writes the pages, and docs/lab-figures.json,
which has what the figures show.

    python docs/scripts/lab_gallery.py --redraw

draws them anew from that file, after a change of how figures or pages are drawn; words and numbers stay.

The present file was read back from the figures that the full run had published: median, least and greatest of the five
seeds (each seed where figures show it; of maps, means to 1/256 of the colour scale).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from printed import kept

from batchnorm.lab import run_all
from batchnorm.lab.experiment import Experiment
from batchnorm.lab.experiments import EXPERIMENTS
from batchnorm.lab.results import Result, Trial
from batchnorm.report import write_gallery

DOCS = Path(__file__).parent.parent
PAGE, IMAGES, DRAWN = DOCS / "lab-gallery.html", DOCS / "images" / "lab", DOCS / "lab-figures.json"
STYLE, FIGURE = "<style>\n:root.*?</style>", "<figure>.*?</figure>"
CHOSEN = (
    "Two settings were chosen after a look at one seed: the learning rate of the loss landscape, and exact statistics "
    "to measure batch + group by. One criterion was changed after the full run: padding was to leave the accuracy of "
    "masked networks within a point, but rounding alone moves it by two in 3,000 steps; now the gradient counts."
)


def keep_figures(results: Sequence[Result]) -> None:
    """What the figures show, in six digits: curves, maps and values of each seed."""
    lines = []
    for result in results:
        trials = [{**vars(trial), "seconds": round(trial.seconds)} for trial in result.trials]
        lines.append(f"{json.dumps(result.name)}: {json.dumps(_six_digits(trials), separators=(',', ':'))}")
    DRAWN.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def _six_digits(value: Any) -> Any:
    """JSON has no number for what is not finite: null."""
    if isinstance(value, dict):
        return {name: _six_digits(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_six_digits(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def redraw() -> None:
    """The figures anew, in the pages and as files, and the page's style."""
    drawn = _numbers(json.loads(DRAWN.read_text(encoding="utf-8")))
    experiments: list[Experiment] = [EXPERIMENTS[name] for name in drawn]
    data = {"training_samples": 0, "test_samples": 0, "notes": ()}
    results = [
        Result(name, {}, data, tuple(Trial(**trial) for trial in trials), (), {}) for name, trials in drawn.items()
    ]
    before = PAGE.read_text(encoding="utf-8")
    page = write_gallery(PAGE, experiments, results, images=IMAGES).read_text(encoding="utf-8")
    for pattern in (STYLE, FIGURE):
        new = re.findall(pattern, page, re.DOTALL)
        assert len(new) == len(re.findall(pattern, before, re.DOTALL)), pattern
        anew = iter(new)
        before = re.sub(pattern, lambda _, anew=anew: next(anew), before, flags=re.DOTALL)
    PAGE.write_text(before, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/lab"))
    parser.add_argument("--redraw", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.redraw:
        redraw()
        return
    experiments = list(EXPERIMENTS.values())
    settings = [(experiment, experiment.configure(quick=options.quick)) for experiment in experiments]
    results = run_all(settings, seeds=options.seeds, folder=options.folder, workers=options.workers)
    note = (
        "Not the full run: shortened settings, which each experiment lists beside those of the full run"
        + (", and fewer than five seeds, so intervals are wide." if len(options.seeds) < 5 else ".")
        if options.quick
        else "The full run."
    )
    note += " " + CHOSEN
    write_gallery(PAGE, experiments, results, note=note, images=IMAGES)
    keep_figures(results)
    lines = [
        "# What the experiments found",
        "",
        "Made by `docs/scripts/lab_gallery.py`; [the same as one self-contained page](lab-gallery.html), with tables "
        "and all settings.",
        "",
    ]
    if options.quick:
        few = "Fewer than five seeds: intervals are wide, and ties many. " if len(options.seeds) < 5 else ""
        lines += [
            '!!! note "A shortened run"',
            f"    These are the settings of `batchnorm lab all --quick`, with {len(options.seeds)} seeds each: fewer "
            "steps, some grids coarser, and 1,797 digits of 8x8 in place of 5,000 of MNIST for the convolutions. "
            f"{few}The full run, `batchnorm lab all`, may decide otherwise.",
            "",
        ]
    lines += [CHOSEN, ""]
    place = ", ".join(f"{name} {value}" for name, value in results[0].environment.items())
    lines += [f"Seeds {', '.join(map(str, results[0].seeds))}. {place}.", ""]
    lines += ["| experiment | reproduced | tie | not reproduced |", "|---|---|---|---|"]
    for experiment, result in zip(experiments, results, strict=True):
        kinds = [finding.kind for finding in result.findings]
        counts = " | ".join(str(kinds.count(kind) or "") for kind in ("reproduced", "tie", "not reproduced"))
        lines.append(f"| [{experiment.title}](#{experiment.name}) | {counts} |")
    for experiment, result in zip(experiments, results, strict=True):
        lines += [
            "",
            f"## {experiment.title} {{#{experiment.name}}}",
            "",
            experiment.question,
            "",
            experiment.setting,
            "",
        ]
        lines += [f"**What would count:** {experiment.criterion}", ""]
        lines += [f"- **{finding.kind}**: {finding.text}" for finding in result.findings]
        for ground in ("light", "dark"):
            lines += ["", f"![{experiment.title}](images/lab/{experiment.name}-{ground}.svg#only-{ground})"]
        lines += ["", f"*{experiment.caption}* Source of the claim: {experiment.source}"]
    page = DOCS / "lab-results.md"
    page.write_text("\n".join(lines) + "\n" + kept(page), encoding="utf-8")


if __name__ == "__main__":
    main()
