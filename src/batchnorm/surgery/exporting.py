"""What exporting a network will do to its batch normalization, said before it is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormError
from batchnorm.nn import batch_norm as ours
from batchnorm.surgery.folding import fold, uses_batch_statistics
from batchnorm.surgery.graph import capture, unwrap
from batchnorm.surgery.layers import ScaleShift


@dataclass(frozen=True)
class ExportedLayer:
    """One layer: what it becomes, and a warning where that is hardly meant."""

    layer: str
    becomes: str
    warning: str | None = None


@dataclass(frozen=True)
class ExportPreview:
    """What ``torch.export`` and ONNX will make of each batch normalization, as the network stands.

    Attributes:
        layers: one entry a layer.
        foldable: how many of them ``bn.fold`` would take away first.
        notes: on the network as a whole.
    """

    layers: tuple[ExportedLayer, ...]
    foldable: int
    notes: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{item.layer}: {item.warning}" for item in self.layers if item.warning)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = []
        for item in self.layers:
            lines.append(f"{item.layer or 'the network'}: {item.becomes}")
            lines += [f"  warning: {item.warning}"] if item.warning else []
        return "\n".join([*lines, *self.notes])


def preview_export(net: nn.Module, example: Any) -> ExportPreview:
    """Say what exporting ``net`` as it stands will do to its batch normalization; nothing is exported or changed.

    Args:
        net: the network.
        example: the input that it would be exported with.

    Raises:
        InputError: when ``net`` is no module or fails on the example.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> print(preview_export(net, torch.randn(2, 3, 8, 8)))
        1: one BatchNormalization with its running statistics as constants
        1 of 1 could be folded first (bn.fold).
    """
    root = unwrap(net, "preview_export")
    kinds = (_BatchNorm, ScaleShift)
    layers = tuple(_preview(name, m) for name, m in root.named_modules() if isinstance(m, kinds))
    notes = []
    try:
        capture(root, example)
    except BatchNormError as error:
        notes.append(f"exporting may fail: {error}")
    try:
        foldable = len(fold(root, example).certificate.folded)
        notes.append(f"{foldable} of {len(layers)} could be folded first (bn.fold).")
    except BatchNormError as error:
        foldable = 0
        notes.append(f"none could be folded first: {error}")
    if root.training:
        notes.append("The network is in training mode: dropout is exported as dropout; call net.eval() first.")
    return ExportPreview(layers, foldable, tuple(notes))


def _preview(name: str, layer: nn.Module) -> ExportedLayer:
    if isinstance(layer, ScaleShift):
        return ExportedLayer(name, "one BatchNormalization with mean, variance 1 and eps 0 as constants")
    assert isinstance(layer, _BatchNorm)
    fused = getattr(layer, "activation", None)
    extra = f", then {fused}" if fused else ""
    if not uses_batch_statistics(layer):
        if getattr(layer, "example_weight", 0.0):
            return ExportedLayer(name, "elementary operations on each example's statistics" + extra)
        return ExportedLayer(name, "one BatchNormalization with its running statistics as constants" + extra)
    updates = layer.updates_statistics if isinstance(layer, ours._BatchNorm) else layer.track_running_stats
    becomes = "normalization by the statistics of whatever batch comes" + extra
    warning = "the output for one sample will depend on the others in its batch; call net.eval() or bn.freeze(net)"
    if updates:
        becomes += "; torch.export writes the running statistics at every call, ONNX drops that"
    return ExportedLayer(name, becomes, warning)
