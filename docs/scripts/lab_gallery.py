"""docs/lab-results.md, docs/lab-gallery.html and docs/images/lab/, out of a run of the lab.

    python docs/scripts/lab_gallery.py runs/lab --quick

runs what is missing of five seeds of every experiment in that folder, and writes the pages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from printed import kept

from batchnorm.lab import run_all
from batchnorm.lab.experiments import EXPERIMENTS
from batchnorm.report import write_gallery

DOCS = Path(__file__).parent.parent
CHOSEN = (
    "Two settings were chosen after a look at one seed: the learning rate of the loss landscape, and exact statistics "
    "to measure batch + group by. One criterion was changed after the full run: padding was to leave the accuracy of "
    "masked networks within a point, but rounding alone moves it by two in 3,000 steps; now the gradient counts."
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
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
    write_gallery(DOCS / "lab-gallery.html", experiments, results, note=note, images=DOCS / "images" / "lab")
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
