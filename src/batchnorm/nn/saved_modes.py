"""What a layer remembers of its modes: while it is frozen, and in the metadata of its state_dict.

In the metadata the keys of a state_dict stay torch's, so the state of a frozen layer also loads into torch's layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from batchnorm.nn.configured import ConfiguredLayer

MODE = {"source": "auto", "update": "auto", "trains_affine": True}
FROZEN = "_before_freezing"
FLAGS = "_requires_grad"


@dataclass(frozen=True)
class Memory:
    """What a layer was: its class, modes, the attributes that it lacked, and its parameters' flags."""

    kind: type[nn.Module]
    mode: dict[str, Any]
    requires_grad: dict[str, bool]
    added: tuple[str, ...] = field(default=())


def flags(layer: nn.Module) -> dict[str, bool]:
    """requires_grad of a layer's own parameters."""
    return {name: p.requires_grad for name, p in layer.named_parameters(recurse=False)}


def mode(layer: nn.Module) -> dict[str, Any]:
    """source, update and trains_affine; torch's layers have the defaults."""
    return {name: getattr(layer, name, default) for name, default in MODE.items()}


def train_affine(layer: ConfiguredLayer, trains: bool, before: dict[str, bool]) -> None:
    """Stops or resumes the training of gamma and beta; `before` is what their flags return to."""
    if trains and not layer.trains_affine:
        set_flags(layer, layer.__dict__.pop(FLAGS, {}))
    elif not trains and layer.trains_affine:
        layer.__dict__[FLAGS] = before
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
            parameter.grad = None  # which an optimizer would still apply
    layer.trains_affine = trains


def set_flags(layer: nn.Module, requires_grad: dict[str, bool]) -> None:
    """Sets requires_grad of the parameters that are named."""
    for name, flag in requires_grad.items():
        parameter = layer._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(flag)


def save(layer: ConfiguredLayer) -> dict[str, Any]:
    """What is not the default, as plain values."""
    now: dict[str, Any] = mode(layer)
    memory: Memory | None = layer.__dict__.get(FROZEN)
    if memory is not None:
        now["frozen"] = {**memory.mode, "requires_grad": memory.requires_grad}
    return {} if now == MODE else now


def load(layer: ConfiguredLayer, saved: dict[str, Any] | None) -> None:
    """Puts a layer in the modes that were saved with its state; where none were, or it is frozen, it keeps its own."""
    if not saved or FROZEN in layer.__dict__:
        return
    before = flags(layer)
    layer.source, layer.update = saved["source"], saved["update"]
    train_affine(layer, saved["trains_affine"], before)
    if "frozen" in saved:
        frozen = saved["frozen"]
        layer.__dict__[FROZEN] = Memory(type(layer), {name: frozen[name] for name in MODE}, frozen["requires_grad"])
