"""What experiments can be told, and the checks of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from batchnorm.errors import InputError


@dataclass(frozen=True)
class Config:
    """What every experiment can be told; each adds its own.

    Args:
        network: "figure1", "convnet", "package.module:factory", or a factory.
        data: "mnist5k", "digits", a .npz file, "package.module:loader", a loader, or a `training.Dataset`.
        insert: put batch norm into a network of the user's that has none, with `batchnorm.insert`.
        steps: updates of each network.
        batch_size: samples a batch.
        lr: learning rate of SGD, constant.
        arguments: of the network's factory, by name, beside what the data gives; None for none.
    """

    network: Any = "figure1"
    data: Any = "mnist5k"
    insert: bool = False
    steps: int = 5000
    batch_size: int = 60
    lr: float = 0.1
    arguments: Any = None

    def every(self, count: int = 50) -> int:
        """Steps between two of about `count` measurements."""
        return max(1, self.steps // count)

    def plain(self) -> dict[str, Any]:
        """Plain values; a factory or data set by its name."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value):
        return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', repr(value))}"
    return str(getattr(value, "name", value))


def is_factory(network: Any) -> bool:
    """Whether a network is one of the user's: a factory, or the name of one."""
    return callable(network) or (isinstance(network, str) and ":" in network)


C = TypeVar("C", bound=Config)


def checked(config: C, experiment: str, changes: Mapping[str, Any]) -> C:
    """The settings with changes.

    Raises:
        InputError: an unknown setting or a value out of range.
    """
    fields = [f.name for f in dataclasses.fields(config)]
    own = changes.get("arguments") is not None and not is_factory(changes.get("network", config.network))
    if own:
        raise InputError(f"lab {experiment}: arguments go with a network of yours, as in package.module:factory")
    for name, value in changes.items():
        if name not in fields:
            raise InputError(f"lab {experiment}: no setting {name!r}; expected one of {', '.join(fields)}")
        _check(experiment, name, value, getattr(config, name))
    return dataclasses.replace(config, **{n: _like(v, getattr(config, n)) for n, v in changes.items()})


def _check(experiment: str, name: str, value: Any, default: Any) -> None:
    def refuse(expected: str) -> None:
        raise InputError(f"lab {experiment}: {name}={value!r}, expected {expected}")

    if name in ("network", "data"):
        return
    if name == "arguments":
        if value is not None and not (isinstance(value, Mapping) and all(isinstance(one, str) for one in value)):
            refuse("a mapping from names of the factory's arguments to values")
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            refuse("true or false")
    elif isinstance(default, (int, float)):
        least = {"steps": 1, "batch_size": 2}.get(name, 0)
        kind = int if isinstance(default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value < least:
            refuse(f"a {'whole ' if isinstance(default, int) else ''}number, {least} or more")
    elif isinstance(default, tuple):
        if not isinstance(value, (tuple, list)) or not value or not all(type(v) in (int, float, str) for v in value):
            refuse("a list with at least one entry, as [1, 2]")
        for entry in value:
            if isinstance(entry, str) != isinstance(default[0], str):
                refuse(f"entries like {default[0]!r}")
    elif isinstance(default, str) and not isinstance(value, str):
        refuse("text")


def _like(value: Any, default: Any) -> Any:
    return tuple(value) if isinstance(default, tuple) else value
