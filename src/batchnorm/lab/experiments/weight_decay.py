"""Weight decay on gamma and beta (Summers & Dinneen 2020, section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchnorm import param_groups
from batchnorm.lab.experiment import ACCURACY, FINAL, Experiment, Measure, accuracy_panel
from batchnorm.lab.fitting import train
from batchnorm.lab.instruments import weight_scales
from batchnorm.lab.results import Finding, Table, Trial
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.lab.verdicts import compare, expect_more
from batchnorm.training.loop import evaluate


@dataclass(frozen=True)
class WeightDecayConfig(Config):
    """Args: decay: of the weights, and of gamma and beta where they decay too."""

    decay: float = 5e-4


def trial(config: WeightDecayConfig, task: Task) -> Trial:
    out = Trial(task.seed)
    decay = config.decay
    arms: dict[str, dict[str, Any]] = {
        "no decay": {"weight_decay": 0.0},
        "weights": {"weight_decay": decay},
        "weights, gamma, beta": {"weight_decay": decay, "norm_weight_decay": decay},
        "gamma toward 1": {"weight_decay": decay, "norm_weight_decay": decay, "gamma_toward_one": True},
    }
    for arm, options in arms.items():
        net = task.normalized()
        history = train(net, task, groups=param_groups(net, **options))
        scales = weight_scales(net, config.lr).values()
        history.note(out, arm, loss=evaluate(net, task.data)[0], norm=sum(s.norm**2 for s in scales) ** 0.5)
    return out


def verdict(config: WeightDecayConfig, table: Table) -> list[Finding]:
    too, alone = "weights, gamma, beta", "weights"
    return [
        expect_more(table, "final", too, alone, "Decay on gamma and beta too: final accuracy (%)"),
        compare(table, "final", "gamma toward 1", alone, "gamma toward 1: final accuracy (%)"),
        compare(table, "final", alone, "no decay", "Decay of the weights: final accuracy (%)"),
        compare(table, "loss", too, alone, "Decay on gamma and beta too: test loss", scale=1, unit="", digits=4),
    ]


EXPERIMENT = Experiment(
    name="weight_decay",
    title="Weight decay on gamma and beta",
    question="Should gamma and beta decay as the weights do?",
    setting="A small convolution network without residual connections, SGD at a constant rate; decay on nothing, on "
    "the weights, on gamma and beta too, and with gamma toward 1 in place of 0.",
    criterion="Decay on gamma and beta raises the final accuracy over decay on the weights alone (95 % interval of "
    "the paired difference). The source finds gains for some architectures and losses for others.",
    source="Summers & Dinneen 2020, section 3.4.",
    config=WeightDecayConfig(network="convnet", data="mnist5k", steps=3000, batch_size=32),
    quick={"data": "digits", "steps": 800, "decay": 5e-3},
    smoke={"data": "digits", "steps": 3},
    seconds=(9, 177),
    trial=trial,
    verdict=verdict,
    panels=(accuracy_panel(limits=(80, None)),),
    measures={
        "best": ACCURACY,
        "final": FINAL,
        "loss": Measure("final test loss", 1, ".4f"),
        "norm": Measure("norm of the weights", 1, ".2f"),
    },
    caption="Test accuracy over training, from 80 %; median and range over the seeds.",
)
