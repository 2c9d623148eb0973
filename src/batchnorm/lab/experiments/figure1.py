"""Figure 1 of Ioffe & Szegedy (2015)."""

from __future__ import annotations

import statistics

from batchnorm.lab.experiment import ACCURACY, FINAL, Experiment, Measure, Panel, accuracy_panel
from batchnorm.lab.fitting import History, train
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import divergences, expect_more


def trial(config: Config, task: Task) -> Trial:
    out = Trial(task.seed)
    histories = {
        "batch norm": train(task.normalized(), task, probe=task.probe),
        "without": train(task.plain(), task, probe=task.probe),
    }
    target = histories["without"].best
    for arm, history in histories.items():
        history.note(out, arm, steps=history.first_step_at(target), drift=_drift(history))
        out.curve(f"percentiles {arm}", arm, history.steps, *zip(*history.percentiles, strict=True))
    return out


def _drift(history: History) -> float:
    """How far the median of the unit's input wandered, in its mean spread from the 15th to the 85th percentile."""
    settled = history.percentiles[1:] or history.percentiles
    medians = [middle for _, middle, _ in settled]
    spread = statistics.fmean(high - low for low, _, high in settled)
    return (max(medians) - min(medians)) / spread if spread else float("inf")


def verdict(config: Config, table: Table) -> list[Finding]:
    fast, slow = table("batch norm", "steps"), table("without", "steps")
    sooner = sum(a < b for a, b in zip(fast, slow, strict=True))
    ratios = sorted(a / b for a, b in zip(fast, slow, strict=True) if b)
    share = statistics.median(ratios) if ratios else float("nan")
    return [
        Finding(
            "reproduced" if sooner == len(fast) else "not reproduced" if not sooner else "tie",
            f"The best accuracy of the network without batch norm was reached sooner with it in {sooner} of "
            f"{len(fast)} seeds; the median share of the steps is {100 * share:.0f} %.",
        ),
        expect_more(table, "best", "batch norm", "without", "Best test accuracy (%)"),
        expect_more(
            table,
            "drift",
            "without",
            "batch norm",
            "Drift of the unit's median (in spreads)",
            scale=1,
            unit="",
            digits=2,
        ),
        *divergences(table),
    ]


EXPERIMENT = Experiment(
    name="figure1",
    title="Figure 1 of Ioffe & Szegedy",
    question="Does batch norm let a sigmoid network train faster and to a higher accuracy, and is what a hidden unit "
    "receives steadier?",
    setting="Three hidden layers of 100 sigmoids, with batch norm before each and without, from the same weights on "
    "the same batches. The paper uses all of MNIST and states neither learning rate nor initial spread; 5,000 digits, "
    "learning rate 0.1 and Glorot's spread are our choice.",
    criterion="With batch norm, the other's best accuracy is reached in fewer steps in every seed, the best accuracy "
    "is higher, and the median of the unit's input wanders less (95 % intervals of the paired differences).",
    source="Ioffe & Szegedy 2015, Figure 1.",
    config=Config(steps=50_000),
    quick={"steps": 3000},
    smoke={"steps": 20, "data": "digits"},
    seconds=(9, 110),
    trial=trial,
    verdict=verdict,
    panels=(
        accuracy_panel(),
        Panel("percentiles batch norm", "One unit's input, with", y="15th, 50th, 85th percentile", kind="lines"),
        Panel("percentiles without", "One unit's input, without", y="15th, 50th, 85th percentile", kind="lines"),
    ),
    measures={
        "best": ACCURACY,
        "final": FINAL,
        "steps": Measure("steps to best of ‘without’", 1, ",.0f"),
        "drift": Measure("drift of the median (spreads)", 1, ".2f"),
    },
    caption="First panel: test accuracy under the moving averages. Second and third: percentiles over the test samples "
    "of what one unit of the last hidden layer receives, in the first seed.",
)
