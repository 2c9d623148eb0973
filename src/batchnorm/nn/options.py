"""The options of a layer beyond torch's, in one table.

Every list of options in the package is derived from `TABLE`: the layers' defaults, checks, `repr` and state, and the
places that know some options and refuse the others. A new option is a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm.batch import POOLS
from batchnorm.errors import InputError
from batchnorm.ops.schemas import ACTIVATIONS
from batchnorm.pools import is_group
from batchnorm.running import ESTIMATORS, NONFINITE, VARIANCES
from batchnorm.sources import Renorm

SOURCES = ("auto", "batch", "running")
UPDATES = ("auto", "never", "always")
AFFINES = ("shared", "domain", "step")


@dataclass(frozen=True)
class Option:
    """One option of a layer, which is a constructor's argument and an attribute.

    Attributes:
        name: the attribute.
        default: its value in torch's layer.
        question: the one of the three that it belongs to: "pool", "source" or "population"; "fusion" for the part after
            the statistics, "training" for gamma and beta.
        choices: the allowed values, where they can be listed.
        problem: says of a value why it is not allowed, or gives None.
        argument: the constructor's word for it, where that is another; None for no argument.
        in_one_call: whether the C++ call computes a layer that has it.
        affine: whether the layer with it is still a scale and shift of each channel, then an activation, in evaluation.
        harmless: a value with which it is so all the same.
        by_step: whether it has a meaning for `StepBatchNorm`.
        by_sample: whether GroupNorm and LayerNorm have it, or lack nothing by it.
        rows: whether it shapes the running statistics, or gamma and beta.
        parts: whether it parts the values of a channel, or its statistics, where torch has one pool and one set.
        walked: whether training with it still is Algorithm 1 of the paper for each channel.
        belongs: whether it has no effect without another option, whose value says more.
    """

    name: str
    default: Any
    question: str
    choices: tuple[Any, ...] | None = None
    problem: Callable[[Any], str | None] | None = None
    argument: str | None = ""
    in_one_call: bool = False
    affine: bool = True
    harmless: Any = None
    by_step: bool = False
    by_sample: bool = False
    rows: bool = False
    parts: bool = False
    walked: bool = True
    belongs: bool = False

    @property
    def spelled(self) -> str:
        """The word that users write."""
        return self.argument or self.name

    def check(self, value: Any) -> None:
        """Raises unless the option can have this value."""
        if self.choices is not None and value not in self.choices:
            raise InputError(f"unknown {self.spelled} {value!r}; choose one of {', '.join(map(str, self.choices))}")
        problem = None if self.problem is None else self.problem(value)
        if problem is not None:
            raise InputError(f"{self.name} must be {problem}, got {value!r}")


def _number(value: Any) -> str | None:
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < 0
    return "an integer of at least 0" if wrong else None


def _group(value: Any) -> str | None:
    return None if is_group(value) else "None, 'world' or a group of torch.distributed"


def _renorm(value: Any) -> str | None:
    return None if value is None or isinstance(value, Renorm) else "a Renorm or None"


def _share(value: Any) -> str | None:
    return None if isinstance(value, (int, float)) and 0 <= value <= 1 else "a number in [0, 1]"


_CALL: dict[str, Any] = {"in_one_call": True}
_STEP: dict[str, Any] = {"by_step": True}
_SAMPLE: dict[str, Any] = {"by_sample": True}
_PARTS: dict[str, Any] = {"parts": True, "walked": False}
TABLE = (
    Option("activation", None, "fusion", (None, *ACTIVATIONS), walked=False, **_CALL),
    Option("negative_slope", 0.01, "fusion", belongs=True, **_CALL, **_SAMPLE),
    Option("source", "auto", "source", SOURCES, **_CALL, **_STEP, **_SAMPLE),
    Option("update", "auto", "population", UPDATES, **_CALL, **_STEP, **_SAMPLE),
    Option("trains_affine", True, "training", (True, False), argument=None, **_STEP),
    Option("running", "ema", "population", ESTIMATORS, **_CALL, **_STEP),
    Option("running_var_kind", "unbiased", "population", VARIANCES, argument="running_var", **_CALL, **_STEP),
    Option("nonfinite", "propagate", "population", NONFINITE, **_STEP),
    Option("renorm", None, "source", problem=_renorm, walked=False),
    Option("example_weight", 0.0, "source", problem=_share, affine=False),
    Option("pool", None, "pool", POOLS, affine=False, harmless="sequence", rows=True, **_PARTS),
    Option("batch_first", True, "pool", (True, False), belongs=True, **_CALL),
    Option("max_steps", 0, "pool", problem=_number, belongs=True, rows=True, **_CALL, **_STEP),
    Option("ghost_size", 0, "pool", problem=_number, **_PARTS, **_SAMPLE),
    Option("ghost_update", "merge", "population", ("merge", "decay"), belongs=True, **_SAMPLE),
    Option("channel_groups", 0, "pool", problem=_number, **_PARTS, **_SAMPLE),
    Option("process_group", None, "pool", problem=_group, parts=True, **_STEP),
    Option("domains", 0, "population", problem=_number, affine=False, rows=True, **_CALL, **_PARTS, **_STEP),
    Option("affine_by", "shared", "fusion", AFFINES, belongs=True, rows=True, **_STEP),
)
BY_NAME = {option.name: option for option in TABLE}
DEFAULTS: dict[str, Any] = {option.name: option.default for option in TABLE}
STATE = ("domain", "label")
"""The attributes of a layer that are no options."""
ATTRIBUTES = {option.spelled: option.name for option in TABLE if option.argument is not None}
"""The attribute of each constructor's argument."""


def check(name: str, value: Any) -> None:
    """Raises unless the option can have this value."""
    BY_NAME[name].check(value)


def changed(layer: Any) -> list[Option]:
    """The options of a layer that differ from torch's; a layer of torch.nn has none."""
    own = layer.__dict__
    return [option for option in TABLE if own.get(option.name, option.default) != option.default]


def spelled_out(layer: Any, kept: set[str]) -> str | None:
    """The options of a layer that differ from torch's and are not among ``kept``, in words, or None."""
    lost = [option for option in changed(layer) if option.name not in kept]
    return ", ".join(f"{option.spelled}={getattr(layer, option.name)!r}" for option in lost) or None


def of(layer: Any) -> dict[str, Any]:
    """All options of a layer, which may be one of torch.nn."""
    return {name: getattr(layer, name, default) for name, default in DEFAULTS.items()}


def shown(layer: Any) -> list[str]:
    """The options of a layer that differ from torch's, as its `repr` shows them."""
    return [f"{option.spelled}={getattr(layer, option.name)!r}" for option in changed(layer)]


def affine_rows(options: dict[str, Any]) -> tuple[int, int]:
    """The domains that have parameters of their own (1: none has), and the rows by step of each parameter (0: none)."""
    domains, steps = rows(options)
    by = options.get("affine_by", "shared")
    return max(domains, 1) if by == "domain" else 1, steps if by == "step" else 0


def rows(options: dict[str, Any]) -> tuple[int, int]:
    """The numbers of domains and time steps that have running statistics of their own; 0: they are not told apart."""
    return options.get("domains", 0), options.get("max_steps", 0) if options.get("pool") == "frame" else 0


def check_together(options: dict[str, Any], layer: Any, momentum: float | None) -> None:
    """Raises where options, each of them possible, do not go together."""
    _check_pools_together(options, layer)
    ghosts, groups = options["ghost_size"], options["channel_groups"]
    if options["ghost_update"] == "decay" and (momentum is None or options["running"] != "ema" or not ghosts):
        raise InputError("ghost_update='decay' needs ghost_size, running='ema' and a momentum")
    if options["ghost_update"] == "decay" and options["process_group"] is not None:
        raise InputError("ghost_update='decay' takes in this rank's ghosts alone; with process_group= give 'merge'")
    if groups and layer.num_features % groups:
        raise InputError(f"channel_groups={groups} does not divide {layer.num_features} channels into equal groups")
    if options["running"] == "debiased" and momentum is None:
        raise InputError("running='debiased' corrects a moving average and needs a momentum, got None")
    if options["renorm"] is not None and not layer.track_running_stats:
        raise InputError("renorm= needs running statistics, got track_running_stats=False")
    if options["renorm"] is not None and (ghosts or options["pool"] == "frame"):
        raise InputError("renorm corrects one pool a channel; it does not go with ghost_size or pool='frame'")
    _check_affine_together(options, layer)
    if (options["domains"] or options["pool"] == "frame") and not layer.track_running_stats:
        raise InputError("domains= and pool='frame' keep running statistics, got track_running_stats=False")


def _check_affine_together(options: dict[str, Any], layer: Any) -> None:
    by = options["affine_by"]
    if by == "shared":
        return
    if by == "domain" and not options["domains"]:
        raise InputError("affine_by='domain' gives each domain its gamma and beta, and needs domains=, their number")
    if by == "step" and options["pool"] != "frame":
        raise InputError("affine_by='step' gives each time step its gamma and beta, and needs pool='frame'")
    if by == "step" and getattr(layer, "reads_sizes", False):
        raise InputError(
            "affine_by='step' is not for StepBatchNorm, whose gamma and beta a recurrence shares over its steps; "
            "BatchNorm1d(pool='frame') has it"
        )
    if not layer.affine:
        raise InputError(f"affine_by={by!r} needs gamma and beta, got affine=False")


def _check_pools_together(options: dict[str, Any], layer: Any) -> None:
    pool, steps = options["pool"], options["max_steps"]
    if pool is not None and not isinstance(layer, nn.BatchNorm1d):
        raise InputError(f"pool={pool!r} is for sequences (batch, time, channels), so for BatchNorm1d alone")
    if pool == "frame" and not steps:
        raise InputError("pool='frame' needs max_steps, the number of time steps with statistics of their own")
    if pool != "frame" and steps:
        raise InputError(f"max_steps={steps} goes with pool='frame' alone")
    if pool is None and not options["batch_first"]:
        raise InputError("batch_first=False goes with pool='sequence' or 'frame'; (N, C, L) has its batch first")
    if options["ghost_size"] and pool == "frame":
        raise InputError("ghost_size does not go with pool='frame', whose pools are the time steps")
