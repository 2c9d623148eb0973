"""The settings of a training run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

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
Statistics = Literal["synchronized", "rank"]
STATISTICS: tuple[Statistics, ...] = get_args(Statistics)
TASKS = ("classification", "regression")
SAMPLES = ("table", "images", "sequences")


class Rule(NamedTuple):
    """What a setting may be: a test of a value, and the words for it."""

    holds: Callable[[Any], bool]
    expected: str


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(lowest: int, expected: str, end: float = math.inf) -> Rule:
    return Rule(lambda v: isinstance(v, int) and not isinstance(v, bool) and lowest <= v < end, expected)


def _choice(choices: tuple[str, ...]) -> Rule:
    return Rule(lambda v: isinstance(v, str) and v in choices, "one of " + ", ".join(choices))


_TEXT = Rule(lambda v: isinstance(v, str) and bool(v), "a text that is not empty")
_FLAG = Rule(lambda v: isinstance(v, bool), "True or False")
_COUNT = _whole(1, "a whole number from 1 up")
_RATE = Rule(lambda v: _is_number(v) and v > 0, "a finite number above 0")
_DECAY = Rule(lambda v: _is_number(v) and v >= 0, "a finite number from 0 up")
_SHARE = Rule(lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)")
_SEED = _whole(0, "a whole number from 0 to 2^63 - 1", 2**63)
_BATCH = _whole(2, "2 or more: one sample has no variance over the batch")
_INTERVAL = _whole(1, "a whole number of steps from 1 up")
_OPTIMIZER, _PLACEMENT, _METHOD = _choice(OPTIMIZERS), _choice(PLACEMENTS), _choice(METHODS)
_STATISTICS = _choice(STATISTICS)
_TASK, _SAMPLES = _choice(TASKS), _choice(SAMPLES)
_ARGUMENTS = Rule(
    lambda v: isinstance(v, Mapping) and all(isinstance(name, str) and name.isidentifier() for name in v),
    "a mapping from names of arguments to values",
)


def _setting(default: Any, rule: Rule) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class TrainConfig:
    """What `train` is to do: the one definition of its settings, which the command line shows as its options.

    A setting that is None gets the default of the network or of the optimizer (`resolve`).

    Args:
        network: figure1 (784-100-100-100-10 sigmoids), convnet, lstm, or package.module:factory. The factory is called
            with those of num_features, in_channels, input_shape, num_classes and num_outputs that it names, and with
            the arguments given beside it.
        data: mnist5k, digits, japanese-vowels, FILE.npz with x and y (and x_test, y_test), FILE.npy with labels in a
            file of their own, FILE.parquet or FILE.arrow with a column of labels, or package.module:loader that returns
            (x, y) or (x, y, x_test, y_test), or a Dataset or DataLoader of torch. Data larger than memory is read in
            parts.
        labels: The .npy file of the labels, where the data is FILE.npy; the column of the labels, where it is a table.
        out: The run folder. Default: runs/<network>-<data>-<n>.
        overwrite: Replace a run in a folder that is not empty.
        baseline: Train the same network without batch norm beside it, from the same weights on the same batches.
            Default: on for built-in networks.
        steps: Updates of each network. Default: figure1: 5000, convnet: 500, lstm: 500, else 2000.
        batch_size: Samples a batch; 2 or more. An incomplete last batch of a pass is not used in training.
        optimizer: sgd or adam.
        lr: Learning rate, constant.
        baseline_lr: Learning rate of the baseline. Default: that of lr.
        momentum: Of SGD; beta1 of Adam. Default: sgd: 0.0, adam: 0.9.
        weight_decay: Of tensors with two or more axes; never of biases, gamma and beta. For SGD it is an L2 penalty,
            for Adam it is decoupled (AdamW).
        seed: Of the split, the initial weights and the order of the batches. The same seed gives the same bits again.
        threads: CPU threads. Default: figure1: 1, lstm: 1, else torch's choice.
        device: cpu, cuda, cuda:1, ...
        placement: Of batch norm: before_activation or after_activation.
        method: Of the population statistics: pooled (the variance over all samples), ioffe (Procedure 2, line 10: the
            mean of the batches' variances) or sequential (pooled, each layer under the final statistics of those
            before it); all are unbiased.
        eval_every: Steps between two measurements. Default: a hundredth of steps; more where the test part is large.
        statistics: If torchrun has started several ranks, which share each batch of batch_size samples:
            synchronized (every layer normalizes by the whole batch; the curve is that of one process up to rounding)
            or rank (each by its own part, which exchanges less; the curve is another one).
        fsdp: Shard the parameters over the ranks (fully_shard of torch), and compute in bfloat16; statistics, gamma and
            beta stay float32. Checkpoints are sharded, too, and load on another number of ranks.
        timeout: Seconds that one rank may wait for the others.
        checkpoint_every: Steps between two checkpoints. Default: those of half a minute.
        task: classification or regression. Default: by the labels: floats are a regression.
        samples: What the samples are: table, images or sequences. Default: by their shape.
        arguments: An argument of the network's factory, NAME=VALUE; may be repeated. Default: what the data gives.
    """

    network: str = _setting("figure1", _TEXT)
    data: str = _setting("mnist5k", _TEXT)
    labels: str | None = _setting(None, _TEXT)
    out: str | None = _setting(None, _TEXT)
    overwrite: bool = _setting(False, _FLAG)
    baseline: bool | None = _setting(None, _FLAG)
    steps: int | None = _setting(None, _COUNT)
    batch_size: int = _setting(BATCH_SIZE, _BATCH)
    optimizer: str = _setting("sgd", _OPTIMIZER)
    lr: float = _setting(LEARNING_RATE, _RATE)
    baseline_lr: float | None = _setting(None, _RATE)
    momentum: float | None = _setting(None, _SHARE)
    weight_decay: float = _setting(0.0, _DECAY)
    seed: int = _setting(SEED, _SEED)
    threads: int | None = _setting(None, _COUNT)
    device: str = _setting("cpu", _TEXT)
    placement: Placement = _setting("before_activation", _PLACEMENT)  # noqa: RUF009, a field
    method: Method = _setting("pooled", _METHOD)  # noqa: RUF009, a field
    eval_every: int | None = _setting(None, _INTERVAL)
    statistics: Statistics = _setting("synchronized", _STATISTICS)  # noqa: RUF009, a field
    fsdp: bool = _setting(False, _FLAG)
    timeout: float = _setting(300.0, _RATE)
    checkpoint_every: int | None = _setting(None, _INTERVAL)
    task: str | None = _setting(None, _TASK)
    samples: str | None = _setting(None, _SAMPLES)
    arguments: Mapping[str, Any] | None = _setting(None, _ARGUMENTS)

    def check(self) -> None:
        """Raise InputError for the first value that is out of its range; None stands for a default."""
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata["rule"]
            if not (value is None and field.default is None) and not rule.holds(value):
                raise InputError(f"train: {field.name}={value!r}, expected {rule.expected}.")

    def resolve(self) -> ResolvedConfig:
        """Check every value, and fill in each that is None.

        Raises:
            InputError: a value is out of its range; the message names the setting.
        """
        self.check()
        steps = self.steps or STEPS.get(self.network, OTHER_STEPS)
        defaults = {
            "baseline": self.network in STEPS,
            "steps": steps,
            "baseline_lr": self.lr,
            "momentum": MOMENTUM[self.optimizer],
            "threads": THREADS.get(self.network),
            "eval_every": max(1, steps // 100),
        }
        arguments = None if self.arguments is None else dict(self.arguments)
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        filled = {name: value for name, value in defaults.items() if given[name] is None}
        return ResolvedConfig(**given | filled | {"arguments": arguments}, eval_every_given=self.eval_every is not None)


@dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """`TrainConfig` with every default filled in; config.json of a run folder holds it."""

    eval_every_given: bool = _setting(True, _FLAG)

    if TYPE_CHECKING:  # filled in by `resolve`
        baseline: bool = False
        steps: int = OTHER_STEPS
        baseline_lr: float = LEARNING_RATE
        momentum: float = 0.0
        eval_every: int = 1

    def to_dict(self) -> dict[str, object]:
        """Plain values, for config.json: all settings but those of the folder."""
        left_out = ("out", "overwrite", "eval_every_given")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ResolvedConfig:
        """The settings that `to_dict` gave, checked.

        Raises:
            ValueError: a setting is missing, or one is unknown.
            InputError: a value is out of its range.
        """
        expected = set(TrainConfig().resolve().to_dict())
        if set(values) != expected:
            raise ValueError(f"settings {sorted(expected ^ set(values))} are missing or unknown")
        config = cls(**values)
        config.check()
        return config
