"""Shifted data at inference, and adaptation by batch norm's statistics (Schneider et al. 2020)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from batchnorm import adapt
from batchnorm.errors import InputError
from batchnorm.lab.experiment import Experiment, Measure, Panel
from batchnorm.lab.fitting import train
from batchnorm.lab.results import Finding, Table, Trial, difference, points
from batchnorm.lab.settings import Config
from batchnorm.lab.task import Task
from batchnorm.training.loop import evaluate


@dataclass(frozen=True)
class DomainShiftConfig(Config):
    """Args: prior: samples that the source counts as, where it is mixed in."""

    prior: float = 16


def _noise(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return x + 0.4 * x.std() * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor) -> Tensor:
    return avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "contrast": lambda x: 0.25 * x + 0.75 * x.mean((1, 2, 3), keepdim=True),
    "brightness": lambda x: x + 0.5 * (x.max() - x.min()),
    "blur": _blur,
    "noise": _noise,
    "inversion": lambda x: x.max() + x.min() - x,
}
MENDED = ("contrast", "brightness")


def trial(config: DomainShiftConfig, task: Task) -> Trial:
    if task.data.x_train.ndim != 4:
        raise InputError(
            f"lab domain_shift: samples have shape {task.data.input_shape}, expected images (C, H, W); give such data"
        )
    out = Trial(task.seed)
    net = task.normalized()
    train(net, task, every=None)
    found: dict[str, list[float]] = {
        "source": [],
        f"adapted, prior {config.prior:g}": [],
        "adapted, prior 0": [],
        "tent": [],
    }
    for shift in SHIFTS.values():
        shifted = dataclasses.replace(task.data, x_test=shift(task.data.x_test))
        batches = list(shifted.x_test.split(200))
        for arm, accuracies in found.items():
            adapted = copy.deepcopy(net).eval()
            if arm == "tent":
                adapt(adapted, batches, prior=0, method="tent")
            elif arm != "source":
                adapt(adapted, batches, prior=0 if arm.endswith(" 0") else config.prior)
            accuracies.append(evaluate(adapted, shifted)[1])
    for arm, accuracies in found.items():
        out.curve("accuracy", arm, range(len(SHIFTS)), accuracies)
        out.add(arm, **dict(zip(SHIFTS, accuracies, strict=True)))
    return out


def verdict(config: DomainShiftConfig, table: Table) -> list[Finding]:
    arm = "adapted, prior 0"
    findings = []
    for name in SHIFTS:
        gain = difference(table(arm, name), table("source", name))
        text = (
            f"{name}: source statistics {100 * table.mean('source', name):.1f} %, adapted "
            f"{100 * table.mean(arm, name):.1f} % ({points(gain)})."
        )
        if name in MENDED:
            findings.append(
                Finding({"more": "reproduced", "tie": "tie", "less": "not reproduced"}[gain.kind], text)  # type: ignore[arg-type]
            )
        elif name == "inversion":
            lost = difference(table("source", "none"), table(arm, name))
            stays = lost.kind == "more" and lost.mean > 0.1
            words = "It does not recover" if stays else "That is no clear loss"
            findings.append(
                Finding(
                    "reproduced" if stays else "not reproduced",
                    f"{text} {words}: unshifted images, source statistics, {100 * table.mean('source', 'none'):.1f} %.",
                )
            )
        else:
            findings.append(Finding("note", text))
    return findings


EXPERIMENT = Experiment(
    name="domain_shift",
    title="Domain shift and adaptation",
    question="Do statistics of the shifted data, without labels, bring a trained network's accuracy back?",
    setting="A network trained on clean images is tested on images of less contrast, brighter, blurred, noisy and "
    "inverted. The statistics of its batch norm layers are then those of the shifted test images, alone (prior 0) or "
    "mixed with the source's; tent also trains gamma and beta on the entropy of the predictions.",
    criterion="Adaptation mends contrast and brightness (higher accuracy than source statistics, 95 % interval), "
    "which change channel means and scales; inversion stays more than 10 points below unshifted data.",
    source="Schneider et al. 2020; Wang et al. 2021 (tent).",
    config=DomainShiftConfig(network="convnet", data="mnist5k", steps=2000, batch_size=32),
    quick={"data": "digits", "steps": 600},
    smoke={"data": "digits", "steps": 2},
    seconds=(2, 45),
    trial=trial,
    verdict=verdict,
    panels=(Panel("accuracy", "Test accuracy on shifted images", x="shift", scale=100, categories=tuple(SHIFTS)),),
    measures={name: Measure(f"{name} (%)", 100) for name in SHIFTS},
    caption="One dot a seed, lines are means.",
)
