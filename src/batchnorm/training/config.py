"""The settings of a training run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from batchnorm.errors import InputError

BATCH_SIZE = 60  # of Figure 1 in Ioffe & Szegedy; their learning rate and initial spread are unstated
SEED = 0

# For each built-in network, and for a network of the user's.
STEPS = {"figure1": 5000, "convnet": 500, "lstm": 500}
LEARNING_RATE = 0.1
THREADS = {"figure1": 1, "lstm": 1}  # its matrices are too small to be worth sharing out
OTHER_STEPS = 2000
MOMENTUM = {"sgd": 0.0, "adam": 0.9}

OPTIMIZERS = ("sgd", "adam")
Placement = Literal["before_activation", "after_activation"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Method = Literal["pooled", "ioffe", "sequential"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class TrainConfig:
    """What `train` is to do. `None` means: the default of the network, filled in by `resolve`.

    Args:
        network: "figure1", "convnet", "lstm", or "package.module:factory".
        data: "mnist5k", "digits", "japanese-vowels", a .npz file, a .npy file (with `labels`), or
            "package.module:loader".
        labels: the .npy file of the labels, where `data` is a .npy file.
        out: the run folder. Default: runs/<network>-<data>-<n>.
        overwrite: replace files of a run folder that is not empty.
        baseline: also train the network without batch norm, from the same initial weights on the
            same batches. Default: yes for the built-in networks.
        steps: updates of each network.
        batch_size: samples a batch; at least 2. An incomplete last batch of a pass is not used.
        optimizer: "sgd" or "adam".
        lr: learning rate, constant.
        baseline_lr: learning rate of the baseline. Default: `lr`.
        momentum: of SGD (default 0); beta1 of Adam (default 0.9).
        weight_decay: of tensors with two or more axes; never of biases, gamma and beta. For SGD an
            L2 penalty, for Adam decoupled (AdamW).
        seed: of the split, the initial weights, and the order of the batches.
        threads: CPU threads. Default: 1 for figure1, else torch's choice.
        device: a torch device.
        placement: "before_activation" or "after_activation".
        method: of the population statistics: "pooled" (the variance over all samples), "ioffe"
            (Procedure 2, line 10: the mean of the batches' variances), or "sequential" (pooled,
            each layer under the final statistics of those before it); all unbiased.
        eval_every: steps between two measurements. Default: a hundredth of `steps`.
    """

    network: str = "figure1"
    data: str = "mnist5k"
    labels: str | None = None
    out: str | None = None
    overwrite: bool = False
    baseline: bool | None = None
    steps: int | None = None
    batch_size: int = BATCH_SIZE
    optimizer: str = "sgd"
    lr: float = LEARNING_RATE
    baseline_lr: float | None = None
    momentum: float | None = None
    weight_decay: float = 0.0
    seed: int = SEED
    threads: int | None = None
    device: str = "cpu"
    placement: Placement = "before_activation"
    method: Method = "pooled"
    eval_every: int | None = None

    def resolve(self) -> ResolvedConfig:
        """Fill in what is None, and check every value.

        Raises:
            InputError: a value is out of its range; the message names the option.
        """
        steps = self.steps if self.steps is not None else STEPS.get(self.network, OTHER_STEPS)
        _check(isinstance(steps, int) and steps >= 1, "steps", steps, "a whole number from 1 up")
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        resolved = ResolvedConfig(
            network=self.network,
            data=self.data,
            labels=self.labels,
            baseline=self.network in STEPS if self.baseline is None else self.baseline,
            steps=steps,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            lr=self.lr,
            baseline_lr=self.lr if self.baseline_lr is None else self.baseline_lr,
            momentum=MOMENTUM[self.optimizer] if self.momentum is None else self.momentum,
            weight_decay=self.weight_decay,
            seed=self.seed,
            threads=THREADS.get(self.network) if self.threads is None else self.threads,
            device=self.device,
            placement=self.placement,
            method=self.method,
            eval_every=max(1, steps // 100) if self.eval_every is None else self.eval_every,
        )
        resolved.check()
        return resolved


@dataclass(frozen=True)
class ResolvedConfig:
    """`TrainConfig` with every default filled in: what config.json of a run folder holds."""

    network: str
    data: str
    labels: str | None
    baseline: bool
    steps: int
    batch_size: int
    optimizer: str
    lr: float
    baseline_lr: float
    momentum: float
    weight_decay: float
    seed: int
    threads: int | None
    device: str
    placement: Placement
    method: Method
    eval_every: int

    def check(self) -> None:
        """Raise InputError for the first value that is out of its range."""
        _check(self.steps >= 1, "steps", self.steps, "a whole number from 1 up")
        _check(
            self.batch_size >= 2,
            "batch_size",
            self.batch_size,
            "2 or more: one sample has no variance over the batch",
        )
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("lr", "baseline_lr"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        _check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        _check(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            self.weight_decay,
            "a finite number from 0 up",
        )
        _check(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2^63 - 1")
        _check(
            self.threads is None or self.threads >= 1,
            "threads",
            self.threads,
            "a whole number from 1 up",
        )
        _check_choice("placement", self.placement, PLACEMENTS)
        _check_choice("method", self.method, METHODS)
        _check(self.eval_every >= 1, "eval_every", self.eval_every, "a whole number of steps from 1 up")

    def to_dict(self) -> dict[str, object]:
        """Plain values, for config.json."""
        return dataclasses.asdict(self)


def _check(holds: bool, name: str, given: object, expected: str) -> None:
    if not holds:
        raise InputError(f"train: {name}={given!r}, expected {expected}.")


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    _check(given in choices, name, given, "one of " + ", ".join(choices))
