"""The lab on a run of `batchnorm train`: its network, its weights, its data and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError
from batchnorm.lab.explanation import Explanation, explain
from batchnorm.lab.playing import BATCHES, Playground, play
from batchnorm.training import load_run
from batchnorm.training.loop import batch_indices
from batchnorm.training.networks import BUILT_IN
from batchnorm.training.objectives import objective_of
from batchnorm.training.runs import Run
from batchnorm.undo import evaluating

SETTINGS = ("layer", "channel", "batch_size", "seed")


@dataclass(frozen=True)
class _Held:
    """A run with its data, and what of it is looked at."""

    run: Run
    data: Any
    layer: str | None
    channel: int
    batch_size: int
    seed: int

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """A training batch, the first after the training for 0."""
        x, y = self.data.x_train, self.data.y_train
        at = batch_indices(len(x), self.batch_size, self.seed, self.run.config.steps + number)
        return x[at], y[at]

    def loss(self, net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return objective_of(self.data).loss(net(batch[0]), batch[1])

    @property
    def name(self) -> str:
        return f"Network {self.run.config.network} as run {self.run.folder} has trained it"


def explain_run(folder: str | Path, **changes: Any) -> tuple[Explanation, str]:
    """`explain` for a training batch and the trained network of a run, and where it comes from.

    Args:
        folder: of the run.
        changes: layer ("" for the first), channel, batch_size (that of the run), seed (that of the run) of the batch.

    Raises:
        InputError, DataError: another setting, a folder without a run, or what `explain` raises.
    """
    held = _held("explain", folder, changes)
    found = explain(held.run.network, held.batch(0), layer=held.layer, channel=held.channel, loss=held.loss)
    return found, f"{held.name}, on a batch of {held.batch_size} training samples of {held.data.name}."


def play_run(folder: str | Path, **changes: Any) -> Playground:
    """`play` for training batches and the trained network of a run; arguments and errors as of `explain_run`."""
    held = _held("play", folder, changes)
    batches = [held.batch(number) for number in range(BATCHES)]
    found = play(held.run.network, batches, layer=held.layer, channel=held.channel, loss=held.loss)
    source = (
        f"{held.name}, layer {found.layer}, channel {found.channel}, on training batches of {held.batch_size} of "
        f"{held.data.name}."
    )
    return replace(found, source=source)


def settings_of_run(folder: str | Path) -> dict[str, Any]:
    """Network, data and arguments of a run as settings of an experiment, which trains the network itself."""
    run = load_run(folder)
    found: dict[str, Any] = {"network": run.config.network, "data": run.load_data()}
    if run.config.network in BUILT_IN:
        return found
    return found | {"insert": True, "arguments": run.config.arguments}


def shapes_of_run(folder: str | Path) -> list[tuple[int, ...]]:
    """The shapes (N, C, *space) that batch norm layers of a run's network normalize in training, each once.

    Raises:
        InputError, DataError: a folder without a run, or a network none of whose layers is called on such a shape.
    """
    run = load_run(folder)
    size, shapes = (run.config.batch_size, *run.example.shape[1:]), dict[tuple[int, ...], None]()

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            shape = args[0].movedim(-1, 1).shape if getattr(module, "channels_last", False) else args[0].shape
            shapes[tuple(shape)] = None

    norms = [module for module in run.network.modules() if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(keep) for module in norms]
    try:
        with evaluating(run.network), torch.no_grad():
            run.network(torch.zeros(size, dtype=run.example.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if not shapes:
        raise InputError(
            f"bench: no batch norm layer of run {folder} is called on a tensor of its own; give shapes, as in 64,256."
        )
    return list(shapes)


def _held(verb: str, folder: str | Path, changes: Mapping[str, Any]) -> _Held:
    run = load_run(folder)
    values: dict[str, Any] = {"layer": "", "channel": 0, "batch_size": run.config.batch_size, "seed": run.config.seed}
    for name, value in changes.items():
        if name not in SETTINGS:
            raise InputError(
                f"lab {verb}: setting {name!r} does not go with a run, which has its own network, data and training; "
                f"expected one of {', '.join(SETTINGS)}"
            )
        least = 2 if name == "batch_size" else 0
        if isinstance(value, bool) or not isinstance(value, type(values[name])) or (name != "layer" and value < least):
            kind = "text" if name == "layer" else f"a whole number, {least} or more"
            raise InputError(f"lab {verb}: {name}={value!r}, expected {kind}")
        values[name] = value
    data = run.load_data()
    if len(data.x_train) < values["batch_size"]:
        raise InputError(
            f"lab {verb}: {len(data.x_train)} training samples do not make one batch of {values['batch_size']}; give "
            "a smaller batch_size."
        )
    values["layer"] = values["layer"] or None
    return _Held(run, data, **values)
